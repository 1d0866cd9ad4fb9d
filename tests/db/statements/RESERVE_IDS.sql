SELECT nextval(pg_get_serial_sequence(%(p_table)s::VARCHAR, 'id')) AS nextval_1
FROM generate_series(1, %(p_count)s::INTEGER)
