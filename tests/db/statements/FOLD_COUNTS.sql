WITH folded AS (DELETE
FROM river_counter
WHERE river_counter.ctid = any(array((SELECT c.ctid
FROM river_counter AS c
WHERE c.minute < date_trunc('minute', now()) - interval '3 minutes'
LIMIT 10000
FOR UPDATE OF c SKIP LOCKED)))
RETURNING river_counter.runner, river_counter.minute, river_counter.queue, river_counter.state, river_counter.jobs, river_counter.batch), of_all_time AS (INSERT INTO river_history (minute, queue, state, jobs) SELECT '-infinity'::timestamptz, folded.queue AS queue, folded.state AS state, CAST(sum(folded.jobs) AS BIGINT) AS sum_1
FROM folded
GROUP BY '-infinity'::timestamptz, folded.queue, folded.state
ORDER BY '-infinity'::timestamptz, folded.queue, folded.state
ON CONFLICT (minute, queue, state) DO UPDATE
SET jobs = (river_history.jobs + excluded.jobs)
RETURNING river_history.jobs), of_minutes AS (INSERT INTO river_history (minute, queue, state, jobs) SELECT folded.minute AS minute, folded.queue AS queue, folded.state AS state, CAST(sum(folded.jobs) AS BIGINT) AS sum_2
FROM folded
GROUP BY folded.minute, folded.queue, folded.state
ORDER BY folded.minute, folded.queue, folded.state
ON CONFLICT (minute, queue, state) DO UPDATE
SET jobs = (river_history.jobs + excluded.jobs)
RETURNING river_history.jobs) SELECT count(*) AS count_1
FROM folded
