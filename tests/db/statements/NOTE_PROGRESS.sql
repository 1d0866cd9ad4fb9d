WITH noting AS (SELECT noted.note AS note, held.at AS at, held.id AS id
FROM unnest(%(p_ids)s::BIGINT[], %(p_tokens)s::TEXT[], %(p_notes)s::TEXT[]) AS noted(id, token, note)
JOIN LATERAL (SELECT w.ctid AS at, w.id AS id
FROM river_job AS w
WHERE w.id = noted.id AND CAST(w.state AS TEXT) = 'running' AND w.attempted_by[cardinality(w.attempted_by)] = noted.token
FOR UPDATE OF w SKIP LOCKED) AS held ON true) UPDATE river_job
SET metadata=(CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END || jsonb_build_object('sqla_river:progress', CAST(noting.note AS JSONB)))
FROM noting
WHERE (river_job.ctid = any(array((SELECT noting.at
FROM noting)))) AND river_job.id + 0 = noting.id AND CAST(river_job.state AS TEXT) = 'running'
