SELECT minutes.minute, by_minute.state, CAST(sum(by_minute.jobs) AS BIGINT) AS jobs
FROM generate_series(date_trunc('minute', greatest(coalesce(%(p_since)s::TIMESTAMP WITH TIME ZONE, now() - CAST(%(p_back)s AS INTERVAL)), now() - interval '7 days')), now(), interval '1 minute') AS minutes(minute)
LEFT OUTER JOIN (SELECT river_history.minute AS minute, river_history.state AS state, river_history.jobs AS jobs
FROM river_history
WHERE river_history.minute >= date_trunc('minute', greatest(coalesce(%(p_since)s::TIMESTAMP WITH TIME ZONE, now() - CAST(%(p_back)s AS INTERVAL)), now() - interval '7 days')) AND (%(p_queue)s::VARCHAR IS NULL OR river_history.queue = %(p_queue)s::VARCHAR) UNION ALL SELECT river_counter.minute AS minute, river_counter.state AS state, river_counter.jobs AS jobs
FROM river_counter
WHERE river_counter.minute >= date_trunc('minute', greatest(coalesce(%(p_since)s::TIMESTAMP WITH TIME ZONE, now() - CAST(%(p_back)s AS INTERVAL)), now() - interval '7 days')) AND (%(p_queue)s::VARCHAR IS NULL OR river_counter.queue = %(p_queue)s::VARCHAR)) AS by_minute ON by_minute.minute = minutes.minute
GROUP BY minutes.minute, by_minute.state
ORDER BY minutes.minute
