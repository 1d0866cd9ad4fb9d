SELECT river_job.priority, date_part('epoch', river_job.scheduled_at) AS due, river_job.id, river_job.queue, river_job.kind, river_job.attempt, river_job.max_attempts, CAST(river_job.args AS TEXT) AS args, CAST(river_job.metadata AS TEXT) AS metadata, CASE WHEN (river_job.metadata ? 'sqla_river:expires_at') THEN jsonb_typeof(river_job.metadata -> 'sqla_river:expires_at') = 'number' AND (river_job.metadata -> 'sqla_river:expires_at') < to_jsonb(EXTRACT(epoch
FROM now())) END AS expired, river_job.attempted_by[cardinality(river_job.attempted_by)]
FROM river_job
WHERE river_job.state = 'running' AND (river_job.attempted_by[cardinality(river_job.attempted_by)] = any(%(p_tokens)s::TEXT[]))
