WITH updated AS (UPDATE river_queue
SET metadata=CAST(%(p_metadata)s::VARCHAR AS JSONB), updated_at=now()
WHERE river_queue.name = %(p_queue)s::VARCHAR
RETURNING river_queue.name, river_queue.paused_at, river_queue.metadata, river_queue.created_at, river_queue.updated_at), told AS (SELECT CASE WHEN %(p_tell)s THEN pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_control', CAST(json_build_object('action', 'metadata_changed', 'metadata', CAST(%(p_metadata)s::VARCHAR AS JSON), 'queue', CAST(%(p_queue)s::VARCHAR AS TEXT)) AS TEXT)) END AS said) SELECT updated.name, updated.paused_at, updated.metadata, updated.created_at, updated.updated_at, told.said
FROM updated
JOIN told ON true
ORDER BY updated.name
