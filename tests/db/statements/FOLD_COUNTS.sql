WITH "over" AS (SELECT c.runner AS runner, c.minute AS minute, c.queue AS queue, c.state AS state, c.jobs AS jobs
FROM river_counter AS c
WHERE c.minute < date_trunc('minute', now()) - interval '3 minutes' AND c.jobs > 0
LIMIT 10000
FOR UPDATE OF c SKIP LOCKED), folded AS (UPDATE river_counter
SET jobs=0
FROM "over"
WHERE river_counter.runner = "over".runner AND river_counter.minute = "over".minute AND river_counter.queue = "over".queue AND river_counter.state = "over".state
RETURNING "over".runner, "over".minute, "over".queue, "over".state, "over".jobs), of_all_time AS (INSERT INTO river_history (minute, queue, state, jobs) SELECT '-infinity'::timestamptz, folded.queue AS queue, folded.state AS state, CAST(sum(folded.jobs) AS BIGINT) AS sum_1
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
