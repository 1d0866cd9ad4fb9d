WITH paused AS (INSERT INTO river_queue (name, paused_at) SELECT meant.name AS name, now() AS now_1
FROM (SELECT CAST(%(p_queue)s::VARCHAR AS TEXT) AS name
WHERE %(p_queue)s::VARCHAR != '*' UNION ALL SELECT river_queue.name AS name
FROM river_queue
WHERE %(p_queue)s::VARCHAR = '*') AS meant
ORDER BY meant.name
ON CONFLICT (name) DO UPDATE
SET paused_at = coalesce(river_queue.paused_at, now()), updated_at = CASE WHEN (river_queue.paused_at IS NULL) THEN now() ELSE river_queue.updated_at END
RETURNING river_queue.name, river_queue.paused_at, river_queue.metadata, river_queue.created_at, river_queue.updated_at), told AS (SELECT CASE WHEN %(p_tell)s THEN pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_control', CAST(json_build_object('action', 'pause', 'queue', CAST(%(p_queue)s::VARCHAR AS TEXT)) AS TEXT)) END AS said) SELECT paused.name, paused.paused_at, paused.metadata, paused.created_at, paused.updated_at, told.said
FROM paused
JOIN told ON true
ORDER BY paused.name
