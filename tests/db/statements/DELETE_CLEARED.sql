DELETE
FROM river_suspect
WHERE river_suspect.ctid = any(array((SELECT s.ctid
FROM river_suspect AS s
WHERE NOT (EXISTS (SELECT w.id
FROM river_job AS w
WHERE w.id = s.job_id AND w.finalized_at IS NULL))
FOR UPDATE OF s SKIP LOCKED)))
