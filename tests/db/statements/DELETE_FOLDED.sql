DELETE
FROM river_counter
WHERE river_counter.ctid = any(array((SELECT c.ctid
FROM river_counter AS c
WHERE c.jobs = 0 AND (c.batch = 0 OR c.minute < now() - interval '1 day' OR (EXISTS (SELECT 1
FROM river_counter AS later
WHERE later.runner = c.runner AND later.batch > c.batch)))
LIMIT 10000
FOR UPDATE OF c SKIP LOCKED)))
