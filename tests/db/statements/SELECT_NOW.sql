SELECT now() AS now, CAST(EXTRACT(epoch
FROM clock_timestamp() - now()) AS DOUBLE PRECISION) AS age
