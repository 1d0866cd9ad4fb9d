SELECT river_runner.id, river_runner.queues, river_runner.slots, river_runner.version, river_runner.lease, clock_timestamp() - river_runner.heartbeat_at AS silent, clock_timestamp() - river_runner.started_at AS age
FROM river_runner
ORDER BY river_runner.started_at, river_runner.id
