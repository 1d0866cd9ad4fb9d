UPDATE river_job
SET state='completed', finalized_at=now()
WHERE (river_job.ctid = any(array((SELECT held.at
FROM unnest(CAST(%(p_ids)s::VARCHAR AS BIGINT[]), CAST(%(p_tokens)s::VARCHAR AS TEXT[])) AS done(id, token)
JOIN LATERAL (SELECT w.ctid AS at, w.id AS id
FROM river_job AS w
WHERE w.id = done.id AND CAST(w.state AS TEXT) = 'running' AND w.attempted_by[cardinality(w.attempted_by)] = done.token
FOR UPDATE OF w SKIP LOCKED) AS held ON true)))) AND CAST(river_job.state AS TEXT) = 'running'
