SELECT river_job.id, CAST(river_job.state AS TEXT) AS state, river_job.finalized_at IS NOT NULL AS finished
FROM river_job
WHERE river_job.id = any(%(p_ids)s::BIGINT[])
