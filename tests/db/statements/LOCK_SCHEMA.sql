SELECT pg_advisory_xact_lock(%(p_key)s::BIGINT) AS pg_advisory_xact_lock_1
