INSERT INTO river_job (kind, args, queue, priority, max_attempts, tags, metadata, state, scheduled_at, unique_key, unique_states) SELECT given.kind, given.args, given.queue, given.priority, given.max_attempts, given.tags, given.metadata, CAST(given.state AS river_job_state) AS state, coalesce(given.scheduled_at, now()) AS coalesce_1, decode(given.unique_key, 'hex') AS decode_1, CAST(given.unique_states AS BIT(8)) AS unique_states
FROM json_to_recordset(CAST(%(p_rows)s::VARCHAR AS JSON)) AS given(kind TEXT, args JSONB, queue TEXT, priority SMALLINT, max_attempts SMALLINT, tags TEXT[], metadata JSONB, state TEXT, scheduled_at TIMESTAMP WITH TIME ZONE, unique_key TEXT, unique_states TEXT, number INTEGER)
ORDER BY given.unique_key, given.number
ON CONFLICT (unique_key)
WHERE unique_key IS NOT NULL AND unique_states IS NOT NULL AND river_job_state_in_bitmask(unique_states, state) DO NOTHING
RETURNING river_job.id, river_job.unique_key
