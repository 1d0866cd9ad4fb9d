UPDATE river_runner
SET heartbeat_at=now()
WHERE river_runner.heartbeat_at > now() + river_runner.lease
