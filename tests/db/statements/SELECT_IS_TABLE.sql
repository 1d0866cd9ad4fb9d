SELECT to_regclass(%(p_name)s::VARCHAR) IS NOT NULL AS anon_1
