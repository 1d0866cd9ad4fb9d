WITH taken AS (UPDATE river_job
SET state='running', attempt=least(river_job.attempt::int + 1, 32767), attempted_at=now(), attempted_by=CASE WHEN (river_job.attempted_by IS NULL) THEN ARRAY[%(p_token)s::VARCHAR] WHEN (array_ndims(river_job.attempted_by) > 1) THEN ARRAY[%(p_token)s::VARCHAR] ELSE array_append(river_job.attempted_by[greatest(cardinality(river_job.attempted_by) - 98, 1):], %(p_token)s::VARCHAR) END
WHERE (river_job.ctid = any(array((SELECT w.ctid
FROM river_suspect
JOIN river_job AS w ON w.id = river_suspect.job_id
LEFT OUTER JOIN river_queue ON river_queue.name = w.queue
WHERE river_suspect.deaths >= 2 AND w.state = 'available' AND w.scheduled_at <= now() AND w.queue = any(%(p_queues)s::TEXT[]) AND w.kind = any(%(p_kinds)s::TEXT[]) AND river_queue.paused_at IS NULL
ORDER BY w.priority, w.scheduled_at, w.id
LIMIT 1
FOR UPDATE OF w SKIP LOCKED)))) AND CAST(river_job.state AS TEXT) = 'available'
RETURNING river_job.priority, date_part('epoch', river_job.scheduled_at) AS due, river_job.id, river_job.queue, river_job.kind, river_job.attempt, river_job.max_attempts, CAST(river_job.args AS TEXT) AS args, CAST(river_job.metadata AS TEXT) AS metadata, CASE WHEN (river_job.metadata ? 'sqla_river:expires_at') THEN jsonb_typeof(river_job.metadata -> 'sqla_river:expires_at') = 'number' AND (river_job.metadata -> 'sqla_river:expires_at') < to_jsonb(EXTRACT(epoch
FROM now())) END AS expired), marked AS (UPDATE river_runner
SET alone=(SELECT taken.id
FROM taken)
WHERE river_runner.id = %(p_id)s::VARCHAR) SELECT taken.priority, taken.due, taken.id, taken.queue, taken.kind, taken.attempt, taken.max_attempts, taken.args, taken.metadata, taken.expired
FROM taken
