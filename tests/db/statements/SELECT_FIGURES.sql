SELECT coalesce((SELECT pg_catalog.pg_stat_all_tables.n_dead_tup
FROM pg_catalog.pg_stat_all_tables
WHERE pg_catalog.pg_stat_all_tables.schemaname = coalesce(%(p_schema)s::VARCHAR, current_schema()) AND pg_catalog.pg_stat_all_tables.relname = 'river_job'), 0) AS dead, greatest(interval '0', (SELECT max(clock_timestamp() - pg_catalog.pg_stat_activity.xact_start) AS max_1
FROM pg_catalog.pg_stat_activity
WHERE pg_catalog.pg_stat_activity.datname = current_database() AND pg_catalog.pg_stat_activity.pid != pg_backend_pid()), (SELECT max(clock_timestamp() - pg_catalog.pg_prepared_xacts.prepared) AS max_2
FROM pg_catalog.pg_prepared_xacts
WHERE pg_catalog.pg_prepared_xacts.database = current_database())) AS oldest, pg_notification_queue_usage() AS usage
