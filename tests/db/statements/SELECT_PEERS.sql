SELECT free.queue, array_agg(hashtext(river_runner.id)) AS places
FROM river_runner
JOIN unnest(river_runner.free) AS free(queue) ON true
WHERE river_runner.heartbeat_at > now() - river_runner.lease AND free.queue = any(%(p_queues)s::TEXT[])
GROUP BY free.queue
