SELECT count(*) AS count_1
FROM (SELECT w.ctid
FROM river_suspect
JOIN river_job AS w ON w.id = river_suspect.job_id
LEFT OUTER JOIN river_queue ON river_queue.name = w.queue
WHERE river_suspect.deaths >= 2 AND w.state = 'available' AND w.scheduled_at <= now() AND w.queue = any(%(p_queues)s::TEXT[]) AND w.kind = any(%(p_kinds)s::TEXT[]) AND river_queue.paused_at IS NULL
ORDER BY w.priority, w.scheduled_at, w.id
LIMIT 1) AS anon_1
