UPDATE river_job
SET state='running', attempt=least(river_job.attempt::int + 1, 32767), attempted_at=now(), attempted_by=CASE WHEN (river_job.attempted_by IS NULL) THEN ARRAY[%(p_token)s::VARCHAR] WHEN (array_ndims(river_job.attempted_by) > 1) THEN ARRAY[%(p_token)s::VARCHAR] ELSE array_append(river_job.attempted_by[greatest(cardinality(river_job.attempted_by) - 98, 1):], %(p_token)s::VARCHAR) END
WHERE (river_job.ctid = any(array((SELECT j.ctid
FROM unnest(%(p_queues)s::TEXT[], %(p_slots)s::INTEGER[], CAST(%(p_since_1)s::TEXT[] AS TIMESTAMP WITH TIME ZONE[]), CAST(%(p_since_2)s::TEXT[] AS TIMESTAMP WITH TIME ZONE[]), CAST(%(p_since_3)s::TEXT[] AS TIMESTAMP WITH TIME ZONE[]), CAST(%(p_since_4)s::TEXT[] AS TIMESTAMP WITH TIME ZONE[])) AS q(queue, slots, since_1, since_2, since_3, since_4)
JOIN LATERAL (SELECT r.ctid AS ctid
FROM unnest(ARRAY[1::smallint, 2::smallint, 3::smallint, 4::smallint], ARRAY[q.since_1, q.since_2, q.since_3, q.since_4]) AS b(priority, since)
JOIN LATERAL (SELECT w.ctid AS ctid
FROM river_job AS w
WHERE w.state = 'available' AND w.queue = q.queue AND w.scheduled_at <= now() AND w.kind = any(%(p_kinds)s::TEXT[]) AND (w.attempt < 2 OR NOT (EXISTS (SELECT river_suspect.job_id
FROM river_suspect
WHERE river_suspect.job_id = w.id AND river_suspect.deaths >= 2))) AND w.priority = b.priority AND w.scheduled_at >= b.since
ORDER BY w.scheduled_at, w.id
LIMIT q.slots
FOR UPDATE OF w SKIP LOCKED) AS r ON true
LIMIT q.slots) AS j ON true
WHERE q.queue <> all(array((SELECT river_queue.name
FROM river_queue
WHERE river_queue.paused_at IS NOT NULL))))))) AND CAST(river_job.state AS TEXT) = 'available'
RETURNING river_job.priority, date_part('epoch', river_job.scheduled_at) AS due, river_job.id, river_job.queue, river_job.kind, river_job.attempt, river_job.max_attempts, CAST(river_job.args AS TEXT) AS args, CAST(river_job.metadata AS TEXT) AS metadata, CASE WHEN (river_job.metadata ? 'sqla_river:expires_at') THEN jsonb_typeof(river_job.metadata -> 'sqla_river:expires_at') = 'number' AND (river_job.metadata -> 'sqla_river:expires_at') < to_jsonb(EXTRACT(epoch
FROM now())) END AS expired
