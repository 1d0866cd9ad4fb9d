SELECT waiting.queue, count(*) AS jobs
FROM (SELECT river_job.queue AS queue
FROM river_job
WHERE river_job.state = 'available'
LIMIT %(p_most)s::INTEGER) AS waiting
GROUP BY waiting.queue HAVING count(*) > %(p_over)s::INTEGER
ORDER BY waiting.queue
