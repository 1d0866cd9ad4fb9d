INSERT INTO river_runner (id, version) SELECT DISTINCT split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1) AS split_part_1, 'lost'
FROM river_job AS w
WHERE w.state = 'running' AND CASE WHEN (w.id != ALL (%(p_refused)s::BIGINT[])) THEN coalesce(split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1), '') ~ '^[A-Za-z0-9_-]{1,60}:[0-9]+:[0-9a-f]{16}$' END AND NOT (EXISTS (SELECT river_runner.id
FROM river_runner
WHERE river_runner.id = split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1)))
ORDER BY split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1)
ON CONFLICT DO NOTHING
