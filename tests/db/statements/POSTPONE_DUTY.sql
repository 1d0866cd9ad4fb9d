UPDATE river_duty
SET due_at=(now() + %(p_after)s)
WHERE river_duty.name = %(p_name)s::VARCHAR
