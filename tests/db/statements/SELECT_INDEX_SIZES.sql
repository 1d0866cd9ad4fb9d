SELECT pg_catalog.pg_class.relname, CAST(greatest(pg_catalog.pg_class.reltuples, 0) AS BIGINT) AS greatest_1
FROM pg_catalog.pg_class
JOIN pg_catalog.pg_namespace ON pg_catalog.pg_namespace.oid = pg_catalog.pg_class.relnamespace
WHERE pg_catalog.pg_namespace.nspname = coalesce(%(p_schema)s::VARCHAR, current_schema()) AND starts_with(pg_catalog.pg_class.relname, 'river_job_')
