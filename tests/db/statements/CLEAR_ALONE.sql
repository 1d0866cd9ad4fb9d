UPDATE river_runner
SET alone=NULL
WHERE river_runner.id = %(p_id)s::VARCHAR
