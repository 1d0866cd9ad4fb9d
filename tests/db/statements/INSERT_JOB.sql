WITH made AS (INSERT INTO river_job (state, max_attempts, scheduled_at, priority, args, kind, metadata, queue, tags)
VALUES (%(p_state)s, %(p_max_attempts)s::SMALLINT, coalesce(%(p_scheduled_at)s::TIMESTAMP WITH TIME ZONE, now()), %(p_priority)s::SMALLINT, %(p_args)s::JSONB, %(p_kind)s::VARCHAR, %(p_metadata)s::JSONB, %(p_queue)s::VARCHAR, %(p_tags)s::VARCHAR(255)[])
RETURNING river_job.id, river_job.state, river_job.attempt, river_job.max_attempts, river_job.attempted_at, river_job.created_at, river_job.finalized_at, river_job.scheduled_at, river_job.priority, river_job.args, river_job.attempted_by, river_job.errors, river_job.kind, river_job.metadata, river_job.queue, river_job.tags, river_job.unique_key, river_job.unique_states), said AS (SELECT pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_insert', '{"queue": ' || CAST(to_json(made.queue) AS TEXT) || '}') AS said
FROM made
WHERE %(p_said)s) SELECT made.id, made.state, made.attempt, made.max_attempts, made.attempted_at, made.created_at, made.finalized_at, made.scheduled_at, made.priority, made.args, made.attempted_by, made.errors, made.kind, made.metadata, made.queue, made.tags, made.unique_key, made.unique_states, (SELECT count(said.said) AS count_1
FROM said) AS said
FROM made
