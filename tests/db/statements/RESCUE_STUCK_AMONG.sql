WITH dead AS (SELECT river_runner.id AS id, river_runner.alone AS alone
FROM river_runner
WHERE river_runner.heartbeat_at < now() - river_runner.lease AND %(p_until)s::TIMESTAMP WITH TIME ZONE >= now()
ORDER BY river_runner.id
FOR UPDATE SKIP LOCKED), stuck AS (SELECT w.id AS id, w.unique_key AS unique_key, w.unique_key IS NOT NULL AND get_bit(w.unique_states, 7) = 1 AND NOT river_job_state_in_bitmask(w.unique_states, w.state) AS takes, dead.id AS owner, dead.alone AS alone
FROM river_job AS w
LEFT OUTER JOIN dead ON dead.id = split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1)
WHERE w.state = 'running' AND (dead.id IS NOT NULL OR NOT (coalesce(split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1), '') ~ '^[A-Za-z0-9_-]{1,60}:[0-9]+:[0-9a-f]{16}$') AND coalesce(w.attempted_at, w.created_at) < now() - interval '1 hour') AND %(p_until)s::TIMESTAMP WITH TIME ZONE >= now() AND w.id = any(%(p_ids)s::BIGINT[])
ORDER BY w.id
LIMIT 1000
FOR UPDATE OF w SKIP LOCKED), counted AS (INSERT INTO river_suspect (job_id, deaths, alone) SELECT stuck.id AS id, 1, CASE WHEN (stuck.alone = stuck.id) THEN 1 ELSE 0 END AS anon_2
FROM stuck
WHERE stuck.owner IS NOT NULL
ORDER BY stuck.id
ON CONFLICT (job_id) DO UPDATE
SET deaths = (river_suspect.deaths + 1), alone = (river_suspect.alone + excluded.alone)
RETURNING river_suspect.job_id, river_suspect.deaths, river_suspect.alone), sentence AS (SELECT stuck.id AS id, stuck.owner AS owner, counted.deaths AS deaths, counted.alone AS alone, stuck.takes AND ((EXISTS (SELECT holder.id
FROM river_job AS holder
WHERE holder.unique_key = stuck.unique_key AND holder.unique_key IS NOT NULL AND holder.unique_states IS NOT NULL AND river_job_state_in_bitmask(holder.unique_states, holder.state) AND holder.id != stuck.id)) OR row_number() OVER (PARTITION BY stuck.unique_key
ORDER BY stuck.id) > 1) AS taken
FROM stuck
LEFT OUTER JOIN counted ON counted.job_id = stuck.id), rescued AS (UPDATE river_job
SET state=CAST(CASE WHEN (CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END ? 'cancel_attempted_at') THEN 'cancelled' WHEN (coalesce(sentence.alone, 0) >= 3 OR coalesce(sentence.taken, false) OR river_job.attempt >= river_job.max_attempts) THEN 'discarded' ELSE 'available' END AS river_job_state), finalized_at=CASE WHEN (CASE WHEN (CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END ? 'cancel_attempted_at') THEN 'cancelled' WHEN (coalesce(sentence.alone, 0) >= 3 OR coalesce(sentence.taken, false) OR river_job.attempt >= river_job.max_attempts) THEN 'discarded' ELSE 'available' END != 'available') THEN now() END, scheduled_at=CASE WHEN (CASE WHEN (CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END ? 'cancel_attempted_at') THEN 'cancelled' WHEN (coalesce(sentence.alone, 0) >= 3 OR coalesce(sentence.taken, false) OR river_job.attempt >= river_job.max_attempts) THEN 'discarded' ELSE 'available' END = 'available') THEN now() ELSE river_job.scheduled_at END, errors=CASE WHEN (river_job.errors IS NULL) THEN ARRAY[jsonb_build_object('at', to_char(river_job.attempted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), 'attempt', river_job.attempt, 'error', CASE WHEN (coalesce(sentence.alone, 0) >= 3) THEN 'rescued: its runner died ' || sentence.alone || ' times while this job ran alone in it; discarded' WHEN coalesce(sentence.taken, false) THEN 'rescued: another job holds its unique key by now; discarded' WHEN (sentence.owner IS NULL) THEN 'rescued: no word of it for an hour' ELSE 'rescued: the lease of runner ' || sentence.owner || ' ran out' END, 'trace', '')] WHEN (array_ndims(river_job.errors) > 1) THEN ARRAY[jsonb_build_object('at', to_char(river_job.attempted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), 'attempt', river_job.attempt, 'error', CASE WHEN (coalesce(sentence.alone, 0) >= 3) THEN 'rescued: its runner died ' || sentence.alone || ' times while this job ran alone in it; discarded' WHEN coalesce(sentence.taken, false) THEN 'rescued: another job holds its unique key by now; discarded' WHEN (sentence.owner IS NULL) THEN 'rescued: no word of it for an hour' ELSE 'rescued: the lease of runner ' || sentence.owner || ' ran out' END, 'trace', '')] ELSE array_append(river_job.errors[greatest(cardinality(river_job.errors) - 23, 1):], jsonb_build_object('at', to_char(river_job.attempted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), 'attempt', river_job.attempt, 'error', CASE WHEN (coalesce(sentence.alone, 0) >= 3) THEN 'rescued: its runner died ' || sentence.alone || ' times while this job ran alone in it; discarded' WHEN coalesce(sentence.taken, false) THEN 'rescued: another job holds its unique key by now; discarded' WHEN (sentence.owner IS NULL) THEN 'rescued: no word of it for an hour' ELSE 'rescued: the lease of runner ' || sentence.owner || ' ran out' END, 'trace', '')) END, metadata=(CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END || jsonb_build_object('river:rescue_count', CASE WHEN jsonb_typeof(river_job.metadata->'river:rescue_count') = 'number' THEN (river_job.metadata->>'river:rescue_count')::numeric ELSE 0 END + 1)), unique_states=CASE WHEN coalesce(sentence.taken, false) THEN set_bit(set_bit(river_job.unique_states, 4, 0), 6, 0) ELSE river_job.unique_states END
FROM sentence
WHERE river_job.id = sentence.id AND CAST(river_job.state AS TEXT) = 'running'
RETURNING river_job.id, river_job.queue, river_job.kind, CAST(river_job.state AS TEXT) AS state, coalesce(sentence.deaths, 0) >= 2 AS suspect, sentence.owner IS NOT NULL AS ours), told AS (SELECT pg_notify(coalesce(%(p_schema)s::VARCHAR, current_schema()) || '.river_insert', '{"queue": ' || CAST(to_json(rescued.queue) AS TEXT) || CASE WHEN bool_or(rescued.suspect) THEN ', "suspects": true}' ELSE ', "deaths": true}' END) AS said
FROM rescued
WHERE rescued.state = 'available' AND %(p_tell)s
GROUP BY rescued.queue) SELECT rescued.id, rescued.queue, rescued.kind, rescued.state, rescued.suspect, rescued.ours, (SELECT count(told.said) AS count_1
FROM told) AS anon_1
FROM rescued
