WITH chosen AS (SELECT w.id AS id, CAST(w.state AS TEXT) AS state, CAST(w.state AS TEXT) != 'running' AS fit
FROM river_job AS w
WHERE w.id = any(%(p_ids)s::BIGINT[])
ORDER BY w.id
FOR UPDATE OF w), changed AS (DELETE
FROM river_job USING chosen
WHERE river_job.id = chosen.id AND chosen.fit
RETURNING river_job.id, river_job.queue, CAST(river_job.state AS TEXT) AS state) SELECT chosen.id, chosen.state, NULL::bigint AS holder, changed.id IS NOT NULL AS done, changed.queue, changed.state AS now
FROM chosen
LEFT OUTER JOIN changed ON changed.id = chosen.id
