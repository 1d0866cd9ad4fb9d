SELECT river_job.id
FROM river_job
WHERE river_job.state = 'running' AND (river_job.attempted_by[cardinality(river_job.attempted_by)] = any(%(p_tokens)s::TEXT[]))
