SELECT coalesce(to_jsonb(river_migration)->>'line', 'main') AS line, max(river_migration.version) AS version
FROM river_migration
GROUP BY 1
