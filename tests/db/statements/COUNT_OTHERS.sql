INSERT INTO river_counter (runner, minute, queue, state, jobs, batch) SELECT 'other', others.minute, others.queue, others.state, count(*) AS count_1, 0
FROM (SELECT last_minutes.minute AS minute, ended_cancelled.queue AS queue, 'cancelled' AS state
FROM generate_series(date_trunc('minute', now()) - interval '3 minutes', now(), interval '1 minute') AS last_minutes(minute)
JOIN LATERAL (SELECT w.queue AS queue, coalesce(split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1), '') AS owner
FROM river_job AS w
WHERE w.state = 'cancelled' AND w.finalized_at >= last_minutes.minute AND w.finalized_at < last_minutes.minute + interval '1 minute'
ORDER BY w.finalized_at
LIMIT 10000) AS ended_cancelled ON true
WHERE NOT (ended_cancelled.owner ~ '^[A-Za-z0-9_-]{1,60}:[0-9]+:[0-9a-f]{16}$') UNION ALL SELECT last_minutes.minute AS minute, ended_discarded.queue AS queue, 'discarded' AS state
FROM generate_series(date_trunc('minute', now()) - interval '3 minutes', now(), interval '1 minute') AS last_minutes(minute)
JOIN LATERAL (SELECT w.queue AS queue, coalesce(split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1), '') AS owner
FROM river_job AS w
WHERE w.state = 'discarded' AND w.finalized_at >= last_minutes.minute AND w.finalized_at < last_minutes.minute + interval '1 minute'
ORDER BY w.finalized_at
LIMIT 10000) AS ended_discarded ON true
WHERE NOT (ended_discarded.owner ~ '^[A-Za-z0-9_-]{1,60}:[0-9]+:[0-9a-f]{16}$') UNION ALL SELECT last_minutes.minute AS minute, ended_completed.queue AS queue, 'completed' AS state
FROM generate_series(date_trunc('minute', now()) - interval '3 minutes', now(), interval '1 minute') AS last_minutes(minute)
JOIN LATERAL (SELECT w.queue AS queue, coalesce(split_part(w.attempted_by[cardinality(w.attempted_by)], '/', 1), '') AS owner
FROM river_job AS w
WHERE w.state = 'completed' AND w.finalized_at >= last_minutes.minute AND w.finalized_at < last_minutes.minute + interval '1 minute' AND (EXISTS (SELECT 1
FROM river_leader
WHERE river_leader.expires_at > now()))
ORDER BY w.finalized_at
LIMIT 10000) AS ended_completed ON true
WHERE NOT (ended_completed.owner ~ '^[A-Za-z0-9_-]{1,60}:[0-9]+:[0-9a-f]{16}$')) AS others
GROUP BY others.minute, others.queue, others.state
ORDER BY others.minute, others.queue, others.state
ON CONFLICT (runner, minute, queue, state) DO UPDATE
SET jobs = excluded.jobs
