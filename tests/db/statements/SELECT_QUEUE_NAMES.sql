WITH RECURSIVE walk_available(queue) AS (SELECT min(w.queue) AS queue
FROM river_job AS w
WHERE w.state = 'available' UNION ALL SELECT (SELECT min(w.queue) AS min_1
FROM river_job AS w
WHERE w.state = 'available' AND w.queue > walk_available.queue) AS anon_1
FROM walk_available
WHERE walk_available.queue IS NOT NULL), walk_pending(queue) AS (SELECT min(w.queue) AS queue
FROM river_job AS w
WHERE w.state = 'pending' UNION ALL SELECT (SELECT min(w.queue) AS min_2
FROM river_job AS w
WHERE w.state = 'pending' AND w.queue > walk_pending.queue) AS anon_2
FROM walk_pending
WHERE walk_pending.queue IS NOT NULL), due AS (SELECT w.queue AS queue, CAST(w.state AS TEXT) AS state
FROM river_job AS w
WHERE w.state IN ('retryable', 'scheduled')
ORDER BY w.scheduled_at, w.id
LIMIT 10001), running AS (SELECT w.queue AS queue
FROM river_job AS w
WHERE w.state = 'running'
ORDER BY w.id
LIMIT 10001) SELECT named.queue
FROM (SELECT walk_available.queue AS queue
FROM walk_available UNION SELECT walk_pending.queue AS queue
FROM walk_pending UNION SELECT due.queue AS queue
FROM due UNION SELECT running.queue AS queue
FROM running UNION SELECT river_queue.name AS name
FROM river_queue UNION SELECT river_counter.queue AS queue
FROM river_counter UNION SELECT river_history.queue AS queue
FROM river_history
WHERE river_history.minute = '-infinity'::timestamptz) AS named
WHERE named.queue IS NOT NULL
ORDER BY named.queue
