SELECT CAST(EXTRACT(epoch
FROM greatest(river_job.scheduled_at, now() - interval '1 day') - clock_timestamp()) AS DOUBLE PRECISION) AS anon_1, CAST(greatest(least(river_job.scheduled_at, now()), now() - interval '1 day') - interval '10 seconds' AS TEXT) AS anon_2
FROM river_job
WHERE river_job.state IN ('retryable', 'scheduled') AND river_job.scheduled_at >= CAST(coalesce(%(p_since)s::VARCHAR, '-infinity') AS TIMESTAMP WITH TIME ZONE) AND river_job.scheduled_at < 'infinity' AND river_job.scheduled_at > now()
ORDER BY river_job.scheduled_at, river_job.id
LIMIT 1
