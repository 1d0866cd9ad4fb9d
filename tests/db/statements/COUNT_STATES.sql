SELECT river_job.queue, CAST(river_job.state AS TEXT) AS state, count(*) AS jobs
FROM river_job
GROUP BY river_job.queue, river_job.state
ORDER BY river_job.queue, river_job.state
