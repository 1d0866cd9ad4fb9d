UPDATE river_duty
SET done_at=now()
WHERE river_duty.name = %(p_name)s::VARCHAR
