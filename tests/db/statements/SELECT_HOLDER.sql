SELECT holder.id
FROM river_job AS holder
WHERE holder.unique_key = %(p_key)s AND holder.unique_key IS NOT NULL AND holder.unique_states IS NOT NULL AND river_job_state_in_bitmask(holder.unique_states, holder.state)
ORDER BY holder.id DESC
LIMIT 1
