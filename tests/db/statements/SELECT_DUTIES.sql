SELECT river_duty.name, CAST(EXTRACT(epoch
FROM river_duty.due_at - clock_timestamp()) AS DOUBLE PRECISION) AS due_in, CAST(EXTRACT(epoch
FROM clock_timestamp() - river_duty.done_at) AS DOUBLE PRECISION) AS done_ago
FROM river_duty
