WITH held AS (SELECT river_queue.name AS name
FROM river_queue
WHERE %(p_queue)s::VARCHAR = '*' OR river_queue.name = %(p_queue)s::VARCHAR
ORDER BY river_queue.name
FOR UPDATE), resumed AS (UPDATE river_queue
SET paused_at=NULL, updated_at=CASE WHEN (river_queue.paused_at IS NOT NULL) THEN now() ELSE river_queue.updated_at END
FROM held
WHERE river_queue.name = held.name
RETURNING river_queue.name, river_queue.paused_at, river_queue.metadata, river_queue.created_at, river_queue.updated_at), told AS (SELECT CASE WHEN %(p_tell)s THEN pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_control', CAST(json_build_object('action', 'resume', 'queue', CAST(%(p_queue)s::VARCHAR AS TEXT)) AS TEXT)) END AS said) SELECT resumed.name, resumed.paused_at, resumed.metadata, resumed.created_at, resumed.updated_at, told.said
FROM resumed
JOIN told ON true
ORDER BY resumed.name
