WITH conflicts AS (SELECT w.id AS id, (EXISTS (SELECT holder.id
FROM river_job AS holder
WHERE holder.unique_key = w.unique_key AND holder.state = 'running')) OR row_number() OVER (PARTITION BY w.unique_key
ORDER BY w.id) > 1 AS taken
FROM river_job AS w
WHERE w.state = 'available' AND w.unique_key IS NOT NULL AND get_bit(w.unique_states, 7) = 0 AND get_bit(w.unique_states, 1) = 1) UPDATE river_job
SET state=CAST(CASE WHEN true THEN 'discarded' ELSE 'available' END AS river_job_state), finalized_at=CASE WHEN true THEN now() END, metadata=CASE WHEN true THEN CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END || '{"unique_key_conflict": "scheduler_discarded"}'::jsonb ELSE river_job.metadata END, unique_states=CASE WHEN true THEN set_bit(set_bit(river_job.unique_states, 4, 0), 6, 0) ELSE river_job.unique_states END
FROM conflicts
WHERE river_job.id = conflicts.id AND conflicts.taken AND CAST(river_job.state AS TEXT) = 'available'
