WITH unfinished AS (SELECT w.id AS id
FROM river_job AS w
WHERE w.id = any(%(p_ids)s::BIGINT[]) AND w.finalized_at IS NULL
ORDER BY w.id
FOR UPDATE OF w SKIP LOCKED), changed AS (UPDATE river_job
SET state=CASE WHEN (river_job.state = 'running') THEN river_job.state ELSE CAST('cancelled' AS river_job_state) END, finalized_at=CASE WHEN (river_job.state != 'running') THEN now() END, metadata=(CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END || jsonb_build_object('cancel_attempted_at', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')))
FROM unfinished
WHERE river_job.id = unfinished.id AND river_job.finalized_at IS NULL
RETURNING river_job.id, river_job.queue, CAST(river_job.state AS TEXT) AS state), told AS (SELECT pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_control', '{"action": "cancel", "job_id": ' || CAST(changed.id AS TEXT) || ', "queue": ' || CAST(to_json(changed.queue) AS TEXT) || '}') AS said
FROM changed
WHERE changed.state = 'running') SELECT changed.id, changed.state, (SELECT count(told.said) AS count_1
FROM told) AS told
FROM changed
