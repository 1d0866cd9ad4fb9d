DELETE
FROM river_job
WHERE (river_job.ctid = any(array((SELECT w.ctid
FROM river_job AS w
WHERE w.state = 'completed' AND w.finalized_at < now() - CAST(%(p_age)s AS INTERVAL) AND w.finalized_at >= coalesce(now() - (CAST(%(p_age)s AS INTERVAL) + %(p_back)s), '-infinity') AND (w.queue = %(p_queue)s::VARCHAR OR %(p_queue)s::VARCHAR IS NULL AND w.queue != all(%(p_others)s::TEXT[]))
ORDER BY w.finalized_at, w.id
LIMIT 1000
FOR UPDATE OF w SKIP LOCKED)))) AND 'completed' = CAST(river_job.state AS TEXT) AND river_job.finalized_at < now() - CAST(%(p_age)s AS INTERVAL)
