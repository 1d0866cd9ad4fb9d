DELETE
FROM river_runner
WHERE river_runner.id = %(p_id)s::VARCHAR AND NOT (EXISTS (SELECT river_job.id
FROM river_job
WHERE river_job.state = 'running' AND starts_with(river_job.attempted_by[cardinality(river_job.attempted_by)], %(p_id)s::VARCHAR || '/')))
