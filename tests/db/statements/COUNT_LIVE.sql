WITH running AS (SELECT w.queue AS queue
FROM river_job AS w
WHERE w.state = 'running'
ORDER BY w.id
LIMIT 10001), due AS (SELECT w.queue AS queue, CAST(w.state AS TEXT) AS state
FROM river_job AS w
WHERE w.state IN ('retryable', 'scheduled')
ORDER BY w.scheduled_at, w.id
LIMIT 10001) SELECT q.queue, (SELECT count(*) AS count_1
FROM (SELECT 1 AS one
FROM river_job AS w
WHERE w.state = 'available' AND w.queue = q.queue
ORDER BY w.priority, w.scheduled_at, w.id
LIMIT 10001) AS some_available) AS available, (SELECT count(*) AS count_2
FROM (SELECT 1 AS one
FROM river_job AS w
WHERE w.state = 'pending' AND w.queue = q.queue
ORDER BY w.id
LIMIT 10001) AS some_pending) AS pending, (SELECT count(*) AS count_3
FROM running
WHERE running.queue = q.queue) AS running, (SELECT count(*) AS count_4
FROM due
WHERE due.queue = q.queue AND due.state = 'scheduled') AS scheduled, (SELECT count(*) AS count_5
FROM due
WHERE due.queue = q.queue AND due.state = 'retryable') AS retryable, (SELECT count(*) AS count_6
FROM running) AS all_running, (SELECT count(*) AS count_7
FROM due) AS all_due, (SELECT clock_timestamp() - greatest(least(min(first.scheduled_at), clock_timestamp()), clock_timestamp() - interval '100 years') AS anon_1
FROM unnest(CAST('{1,2,3,4}' AS INTEGER[])) AS p(priority)
JOIN LATERAL (SELECT w.scheduled_at AS scheduled_at
FROM river_job AS w
WHERE w.state = 'available' AND w.queue = q.queue AND w.priority = p.priority
ORDER BY w.scheduled_at
LIMIT 1) AS first ON true HAVING count(*) > 0) AS oldest
FROM unnest(%(p_queues)s::TEXT[]) AS q(queue)
