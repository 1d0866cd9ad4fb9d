SELECT river_job.id, CAST(river_job.state AS TEXT) AS state
FROM unnest(CAST(%(p_ids)s::VARCHAR AS BIGINT[]), CAST(%(p_tokens)s::VARCHAR AS TEXT[])) AS done(id, token)
JOIN river_job ON river_job.id = done.id
WHERE done.token = river_job.attempted_by[cardinality(river_job.attempted_by)]
