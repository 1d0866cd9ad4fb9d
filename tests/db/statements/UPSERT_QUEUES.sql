WITH held AS (SELECT river_queue.name AS name
FROM river_queue
WHERE river_queue.name = any(%(p_queues)s::TEXT[])
ORDER BY river_queue.name
FOR UPDATE SKIP LOCKED), touched AS (UPDATE river_queue
SET updated_at=now()
FROM held
WHERE river_queue.name = held.name) INSERT INTO river_queue (name) SELECT names.name
FROM unnest(%(p_queues)s::TEXT[]) AS names(name)
WHERE NOT (EXISTS (SELECT river_queue.name
FROM river_queue
WHERE river_queue.name = names.name)) AND set_config('lock_timeout', '100ms', true) IS NOT NULL
ORDER BY names.name
ON CONFLICT DO NOTHING
