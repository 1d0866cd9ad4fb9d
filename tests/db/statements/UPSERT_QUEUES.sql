INSERT INTO river_queue (name) SELECT names.name
FROM unnest(%(p_queues)s::TEXT[]) AS names(name)
ORDER BY names.name
ON CONFLICT (name) DO UPDATE
SET updated_at = now()
