UPDATE river_job
SET attempted_at=now()
WHERE (river_job.ctid = any(array((SELECT w.ctid
FROM river_job AS w
WHERE w.state = 'running' AND starts_with(w.attempted_by[cardinality(w.attempted_by)], %(p_id)s::VARCHAR || '/') AND w.attempted_at < now() - interval '30 minutes' AND (EXISTS (SELECT 1
FROM river_leader
WHERE river_leader.expires_at > now()))
ORDER BY w.id
FOR UPDATE OF w SKIP LOCKED)))) AND CAST(river_job.state AS TEXT) = 'running'
