SELECT w.id
FROM river_job AS w
WHERE w.state = 'running' AND w.id > %(p_after)s::BIGINT AND w.id != ALL (%(p_refused)s::BIGINT[])
ORDER BY w.id
LIMIT 1000
