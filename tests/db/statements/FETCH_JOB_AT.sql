UPDATE river_job
SET state='running', attempt=least(river_job.attempt::int + 1, 32767), attempted_at=%(p_now)s::TIMESTAMP WITH TIME ZONE, attempted_by=CASE WHEN (river_job.attempted_by IS NULL) THEN ARRAY[%(p_token)s::VARCHAR] WHEN (array_ndims(river_job.attempted_by) > 1) THEN ARRAY[%(p_token)s::VARCHAR] ELSE array_append(river_job.attempted_by[greatest(cardinality(river_job.attempted_by) - 98, 1):], %(p_token)s::VARCHAR) END
WHERE (river_job.ctid = any(array((SELECT j.ctid
FROM unnest(%(p_queues)s::TEXT[], %(p_slots)s::INTEGER[]) AS q(queue, slots)
JOIN LATERAL (SELECT w.ctid AS ctid
FROM river_job AS w
WHERE w.state = 'available' AND w.queue = q.queue AND w.scheduled_at <= %(p_now)s::TIMESTAMP WITH TIME ZONE AND w.kind = any(%(p_kinds)s::TEXT[]) AND w.id = %(p_id)s::BIGINT
ORDER BY w.priority, w.scheduled_at, w.id
LIMIT q.slots
FOR UPDATE OF w SKIP LOCKED) AS j ON true
WHERE q.queue <> all(array((SELECT river_queue.name
FROM river_queue
WHERE river_queue.paused_at IS NOT NULL))))))) AND CAST(river_job.state AS TEXT) = 'available'
RETURNING river_job.priority, date_part('epoch', river_job.scheduled_at) AS due, river_job.id, river_job.queue, river_job.kind, river_job.attempt, river_job.max_attempts, CAST(river_job.args AS TEXT) AS args, CAST(river_job.metadata AS TEXT) AS metadata, CASE WHEN (river_job.metadata ? 'sqla_river:expires_at') THEN jsonb_typeof(river_job.metadata -> 'sqla_river:expires_at') = 'number' AND (river_job.metadata -> 'sqla_river:expires_at') < to_jsonb(EXTRACT(epoch
FROM %(p_now)s::TIMESTAMP WITH TIME ZONE)) END AS expired
