WITH chosen AS (SELECT w.id AS id, CAST(w.state AS TEXT) AS state, w.finalized_at IS NULL AND CAST(w.state AS TEXT) != 'running' AS fit, w.unique_key AS unique_key, %(p_due)s AND w.state != 'pending' AND w.unique_key IS NOT NULL AND get_bit(w.unique_states, 7) = 1 AND NOT river_job_state_in_bitmask(w.unique_states, w.state) AS takes
FROM river_job AS w
WHERE w.id = any(%(p_ids)s::BIGINT[]) AND w.finalized_at IS NULL AND CAST(w.state AS TEXT) != 'running'
ORDER BY w.id
FOR UPDATE OF w SKIP LOCKED), judged AS (SELECT chosen.id AS id, chosen.state AS state, chosen.fit AS fit, CASE WHEN chosen.takes THEN coalesce((SELECT holder.id
FROM river_job AS holder
WHERE holder.unique_key = chosen.unique_key AND holder.unique_key IS NOT NULL AND holder.unique_states IS NOT NULL AND river_job_state_in_bitmask(holder.unique_states, holder.state) AND holder.id != chosen.id
LIMIT 1), nullif(first_value(chosen.id) OVER (PARTITION BY chosen.unique_key, chosen.takes, chosen.fit
ORDER BY chosen.id), chosen.id)) END AS holder
FROM chosen), changed AS (UPDATE river_job
SET state=CAST(CASE WHEN (river_job.state = 'pending') THEN 'pending' WHEN %(p_due)s THEN 'available' WHEN (river_job.state = 'retryable') THEN 'retryable' ELSE 'scheduled' END AS river_job_state), scheduled_at=%(p_scheduled_at)s::TIMESTAMP WITH TIME ZONE
FROM judged
WHERE river_job.id = judged.id AND judged.fit AND judged.holder IS NULL
RETURNING river_job.id, river_job.queue, CAST(river_job.state AS TEXT) AS state) SELECT judged.id, judged.state, judged.holder AS holder, changed.id IS NOT NULL AS done, changed.queue, changed.state AS now
FROM judged
LEFT OUTER JOIN changed ON changed.id = judged.id
