INSERT INTO river_duty (name) SELECT names.name
FROM unnest(%(p_names)s::TEXT[]) AS names(name)
ORDER BY names.name
ON CONFLICT DO NOTHING
