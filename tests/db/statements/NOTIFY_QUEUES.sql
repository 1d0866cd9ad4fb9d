SELECT pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_insert', '{"queue": ' || CAST(to_json(q.queue) AS TEXT) || '}') AS pg_notify_1
FROM unnest(%(p_queues)s::TEXT[]) AS q(queue)
