INSERT INTO river_counter (runner, minute, queue, state, jobs, batch) SELECT %(p_id)s::VARCHAR AS anon_1, date_trunc('minute', %(p_at)s::TIMESTAMP WITH TIME ZONE) AS date_trunc_1, given.queue, given.state, given.jobs, %(p_batch)s::BIGINT AS anon_2
FROM unnest(%(p_queues)s::TEXT[], %(p_states)s::TEXT[], %(p_jobs)s::BIGINT[]) AS given(queue, state, jobs)
ORDER BY given.queue, given.state
ON CONFLICT (runner, minute, queue, state) DO UPDATE
SET jobs = (river_counter.jobs + excluded.jobs), batch = excluded.batch
WHERE river_counter.batch < excluded.batch
