SELECT CAST(NULL AS TEXT) AS queue, CAST(now() - CAST(%(p_before)s AS INTERVAL) AS TEXT) AS since UNION ALL SELECT river_job.queue, CAST(least(max(river_job.scheduled_at), now() - CAST(%(p_before)s AS INTERVAL)) AS TEXT) AS least_1
FROM river_job
WHERE river_job.id = any(%(p_ids)s::BIGINT[])
GROUP BY river_job.queue
