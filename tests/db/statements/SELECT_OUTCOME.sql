SELECT CAST(river_job.state AS TEXT) AS state
FROM river_job
WHERE river_job.id = %(p_id)s::BIGINT AND %(p_token)s::VARCHAR = river_job.attempted_by[cardinality(river_job.attempted_by)]
FOR UPDATE
