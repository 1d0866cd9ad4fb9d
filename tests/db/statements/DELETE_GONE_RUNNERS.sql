DELETE
FROM river_runner
WHERE river_runner.heartbeat_at < now() - 10 * river_runner.lease AND NOT (EXISTS (SELECT w.id
FROM river_job AS w
WHERE w.state = 'running' AND river_runner.id = split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1)))
