SELECT w.id, w.queue, w.kind
FROM river_job AS w
LEFT OUTER JOIN river_queue ON river_queue.name = w.queue
WHERE w.state = 'available' AND w.scheduled_at <= %(p_now)s::TIMESTAMP WITH TIME ZONE AND w.kind = any(%(p_kinds)s::TEXT[]) AND river_queue.paused_at IS NULL
ORDER BY w.priority, w.scheduled_at, w.id
LIMIT 1
FOR UPDATE OF w SKIP LOCKED
