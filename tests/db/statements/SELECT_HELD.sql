SELECT read.id, read.state
FROM unnest(CAST(%(p_ids)s::VARCHAR AS BIGINT[]), CAST(%(p_tokens)s::VARCHAR AS TEXT[])) AS done(id, token)
JOIN LATERAL (SELECT w.id AS id, CAST(w.state AS TEXT) AS state
FROM river_job AS w
WHERE w.id = done.id AND w.attempted_by[cardinality(w.attempted_by)] = done.token
LIMIT ALL OFFSET 0) AS read ON true
