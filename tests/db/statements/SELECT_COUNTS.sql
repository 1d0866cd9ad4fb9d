SELECT counted.queue, counted.state, CAST(sum(counted.jobs) AS BIGINT) AS jobs, CAST(sum(counted.lately) AS BIGINT) AS lately, CAST(EXTRACT(epoch
FROM clock_timestamp() - (date_trunc('minute', now()) - interval '5 minutes')) AS DOUBLE PRECISION) AS seconds
FROM (SELECT river_history.queue AS queue, river_history.state AS state, river_history.jobs AS jobs, 0 AS lately
FROM river_history
WHERE river_history.minute = '-infinity'::timestamptz UNION ALL SELECT river_history.queue AS queue, river_history.state AS state, 0, river_history.jobs AS jobs
FROM river_history
WHERE river_history.minute >= date_trunc('minute', now()) - interval '5 minutes' UNION ALL SELECT river_counter.queue AS queue, river_counter.state AS state, river_counter.jobs AS jobs, CASE WHEN (river_counter.minute >= date_trunc('minute', now()) - interval '5 minutes') THEN river_counter.jobs ELSE 0 END AS anon_1
FROM river_counter) AS counted
WHERE counted.queue = any(%(p_queues)s::TEXT[])
GROUP BY counted.queue, counted.state
