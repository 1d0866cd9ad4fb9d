WITH due AS (SELECT w.id AS id, w.unique_key AS unique_key, w.unique_key IS NOT NULL AND get_bit(w.unique_states, 7) = 1 AND NOT river_job_state_in_bitmask(w.unique_states, w.state) AS takes
FROM river_job AS w
WHERE w.state IN ('retryable', 'scheduled') AND w.scheduled_at <= now() AND (SELECT set_config('lock_timeout', '100ms', true) AS set_config_1) IS NOT NULL AND w.id = any(%(p_ids)s::BIGINT[])
ORDER BY w.scheduled_at, w.id
LIMIT 1000
FOR UPDATE OF w SKIP LOCKED), judged AS (SELECT due.id AS id, due.takes AND ((EXISTS (SELECT holder.id
FROM river_job AS holder
WHERE holder.unique_key = due.unique_key AND holder.unique_key IS NOT NULL AND holder.unique_states IS NOT NULL AND river_job_state_in_bitmask(holder.unique_states, holder.state) AND holder.id != due.id)) OR row_number() OVER (PARTITION BY due.unique_key
ORDER BY due.id) > 1) AS taken
FROM due), moved AS (UPDATE river_job
SET state=CAST(CASE WHEN coalesce(judged.taken, false) THEN 'discarded' ELSE 'available' END AS river_job_state), finalized_at=CASE WHEN coalesce(judged.taken, false) THEN now() END, metadata=CASE WHEN coalesce(judged.taken, false) THEN CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END || '{"unique_key_conflict": "scheduler_discarded"}'::jsonb ELSE river_job.metadata END, unique_states=CASE WHEN coalesce(judged.taken, false) THEN set_bit(set_bit(river_job.unique_states, 4, 0), 6, 0) ELSE river_job.unique_states END
FROM judged
WHERE river_job.id = judged.id
RETURNING river_job.queue), queues_moved AS (SELECT moved.queue AS queue, count(*) AS jobs
FROM moved
GROUP BY moved.queue) SELECT queues_moved.queue, queues_moved.jobs
FROM queues_moved
