SELECT oldest.kind, count(*) AS jobs
FROM unnest(%(p_queues)s::TEXT[]) AS asked(name)
JOIN generate_series(1, 4) AS lanes(priority) ON true
JOIN LATERAL (SELECT w.kind AS kind
FROM river_job AS w
WHERE w.state = 'available' AND w.queue = asked.name AND w.priority = lanes.priority AND w.scheduled_at < now() - CAST(%(p_age)s AS INTERVAL)
ORDER BY w.scheduled_at, w.id
LIMIT 250) AS oldest ON true
WHERE oldest.kind != all(%(p_kinds)s::TEXT[])
GROUP BY oldest.kind
ORDER BY 2 DESC, oldest.kind
LIMIT 20
