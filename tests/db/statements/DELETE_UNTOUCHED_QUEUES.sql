DELETE
FROM river_queue
WHERE river_queue.ctid = any(array((SELECT q.ctid
FROM river_queue AS q
WHERE q.updated_at < now() - interval '24 hours' AND q.paused_at IS NULL
FOR UPDATE OF q SKIP LOCKED)))
