UPDATE river_duty
SET due_at=(now() + %(p_every)s)
WHERE river_duty.name = %(p_name)s::VARCHAR AND (river_duty.due_at <= now() OR river_duty.due_at > now() + %(p_far)s)
RETURNING river_duty.name
