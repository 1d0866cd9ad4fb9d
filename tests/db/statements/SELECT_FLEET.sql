WITH here AS (SELECT river_job.id AS id, river_job.attempted_by[cardinality(river_job.attempted_by)] AS token, CASE WHEN (jsonb_typeof(river_job.metadata) = 'object') THEN river_job.metadata ELSE '{}'::jsonb END ? 'cancel_attempted_at' AS asked, river_job.attempted_at <= %(p_before)s::TIMESTAMP WITH TIME ZONE OR river_job.attempted_at > now() AS "old"
FROM river_job
WHERE river_job.state = 'running' AND starts_with(river_job.attempted_by[cardinality(river_job.attempted_by)], %(p_id)s::VARCHAR || '/')) SELECT (SELECT count(*) AS count_1
FROM river_runner
WHERE river_runner.heartbeat_at > now() - river_runner.lease AND river_runner.id < %(p_id)s::VARCHAR) AS rank, EXISTS (SELECT river_suspect.job_id
FROM river_suspect
WHERE river_suspect.deaths >= 2) AS suspects, EXISTS (SELECT river_suspect.job_id
FROM river_suspect
WHERE (SELECT CAST(river_job.state AS TEXT) AS state
FROM river_job
WHERE river_job.id = river_suspect.job_id) IN ('available', 'running')) AS deaths, array((SELECT here.id
FROM here
WHERE here.asked
ORDER BY here.id)) AS cancelled, hashtext(%(p_id)s::VARCHAR) AS place, array((SELECT here.id
FROM here
WHERE here."old"
ORDER BY here.id)) AS ids, array((SELECT here.token
FROM here
WHERE here."old"
ORDER BY here.id)) AS tokens
