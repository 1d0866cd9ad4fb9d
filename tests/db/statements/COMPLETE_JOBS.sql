UPDATE river_job
SET state='completed', finalized_at=now()
WHERE river_job.id = any(CAST((SELECT CAST(%(p_ids)s::VARCHAR AS BIGINT[]) AS anon_1) AS BIGINT[])) AND CAST(river_job.state AS TEXT) = 'running' AND (SELECT %(p_tokens)s::TEXT[] AS anon_2)[width_bucket(river_job.id, (SELECT %(p_firsts)s::BIGINT[] AS anon_3))] = river_job.attempted_by[cardinality(river_job.attempted_by)] AND (river_job.xmax = '0' OR river_job.xmax = river_job.xmin)
