WITH chosen AS (SELECT w.id AS id, CAST(w.state AS TEXT) AS state, w.finalized_at IS NULL AS fit
FROM river_job AS w
WHERE w.id = any(%(p_ids)s::BIGINT[]) AND w.finalized_at IS NULL
ORDER BY w.id
FOR UPDATE OF w SKIP LOCKED), changed AS (UPDATE river_job
SET state=CASE WHEN (river_job.state = 'running') THEN river_job.state ELSE CAST('cancelled' AS river_job_state) END, finalized_at=CASE WHEN (river_job.state != 'running') THEN now() END, metadata=(CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END || jsonb_build_object('cancel_attempted_at', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')))
FROM chosen
WHERE river_job.id = chosen.id AND chosen.fit
RETURNING river_job.id, river_job.queue, CAST(river_job.state AS TEXT) AS state), told AS (SELECT pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_control', '{"action": "cancel", "job_id": ' || CAST(changed.id AS TEXT) || ', "queue": ' || CAST(to_json(changed.queue) AS TEXT) || '}') AS said
FROM changed
WHERE changed.state = 'running') SELECT chosen.id, chosen.state, NULL::bigint AS holder, changed.id IS NOT NULL AS done, changed.queue, changed.state AS now, (SELECT count(told.said) AS count_1
FROM told) AS told
FROM chosen
LEFT OUTER JOIN changed ON changed.id = chosen.id
