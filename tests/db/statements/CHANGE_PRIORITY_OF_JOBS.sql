WITH chosen AS (SELECT w.id AS id, CAST(w.state AS TEXT) AS state, w.finalized_at IS NULL AS fit
FROM river_job AS w
WHERE w.id = any(%(p_ids)s::BIGINT[]) AND w.finalized_at IS NULL
ORDER BY w.id
FOR UPDATE OF w SKIP LOCKED), changed AS (UPDATE river_job
SET priority=%(p_priority)s::SMALLINT
FROM chosen
WHERE river_job.id = chosen.id AND chosen.fit
RETURNING river_job.id, river_job.queue, CAST(river_job.state AS TEXT) AS state) SELECT chosen.id, chosen.state, NULL::bigint AS holder, changed.id IS NOT NULL AS done, changed.queue, changed.state AS now
FROM chosen
LEFT OUTER JOIN changed ON changed.id = chosen.id
