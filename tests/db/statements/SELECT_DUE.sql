SELECT w.id, w.unique_key IS NOT NULL AND get_bit(w.unique_states, 7) = 1 AND NOT river_job_state_in_bitmask(w.unique_states, w.state) AS takes
FROM river_job AS w
WHERE w.state IN ('retryable', 'scheduled') AND w.scheduled_at <= now() AND w.id != all(%(p_refused)s::BIGINT[])
ORDER BY w.scheduled_at DESC, w.id DESC
LIMIT 1000
FOR UPDATE OF w SKIP LOCKED
