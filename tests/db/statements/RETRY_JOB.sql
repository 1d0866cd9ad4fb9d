WITH chosen AS (SELECT w.id AS id, CAST(w.state AS TEXT) AS state, CAST(w.state AS TEXT) != 'running' AND NOT (w.state = 'available' AND w.scheduled_at <= now() AND NOT (w.metadata ? 'cancel_attempted_at')) AS fit, w.unique_key AS unique_key, w.unique_key IS NOT NULL AND get_bit(w.unique_states, 7) = 1 AND NOT river_job_state_in_bitmask(w.unique_states, w.state) AS takes
FROM river_job AS w
WHERE w.id = any(%(p_ids)s::BIGINT[])
ORDER BY w.id
FOR UPDATE OF w), judged AS (SELECT chosen.id AS id, chosen.state AS state, chosen.fit AS fit, CASE WHEN chosen.takes THEN coalesce((SELECT holder.id
FROM river_job AS holder
WHERE holder.unique_key = chosen.unique_key AND holder.unique_key IS NOT NULL AND holder.unique_states IS NOT NULL AND river_job_state_in_bitmask(holder.unique_states, holder.state) AND holder.id != chosen.id
LIMIT 1), nullif(first_value(chosen.id) OVER (PARTITION BY chosen.unique_key, chosen.takes, chosen.fit
ORDER BY chosen.id), chosen.id)) END AS holder
FROM chosen), changed AS (UPDATE river_job
SET state=CAST('available' AS river_job_state), max_attempts=greatest(river_job.max_attempts, least(river_job.attempt + 1, 32767)), finalized_at=NULL, scheduled_at=now(), metadata=CASE WHEN (CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END ? 'cancel_attempted_at') THEN CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END - 'cancel_attempted_at' ELSE river_job.metadata END
FROM judged
WHERE river_job.id = judged.id AND judged.fit AND judged.holder IS NULL
RETURNING river_job.id, river_job.queue, CAST(river_job.state AS TEXT) AS state) SELECT judged.id, judged.state, judged.holder AS holder, changed.id IS NOT NULL AS done, changed.queue, changed.state AS now
FROM judged
LEFT OUTER JOIN changed ON changed.id = judged.id
