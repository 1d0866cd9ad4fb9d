SELECT 'pid ' || a.pid AS who, concat_ws(', ', a.usename, nullif(a.application_name, ''), a.state) AS what, CAST(now() - a.xact_start AS INTERVAL) AS age
FROM pg_stat_activity a
WHERE a.datname = current_database() AND a.backend_type = 'client backend' AND a.xact_start < now() - CAST(%(p_age)s AS INTERVAL) UNION ALL SELECT 'prepared transaction ' || quote_literal(p.gid), p.owner::text, CAST(now() - p.prepared AS INTERVAL) AS anon_1
FROM pg_prepared_xacts p
WHERE p.database = current_database() AND p.prepared < now() - CAST(%(p_age)s AS INTERVAL)
ORDER BY 3 DESC
LIMIT 3
