DELETE
FROM river_history
WHERE river_history.ctid = any(array((SELECT h.ctid
FROM river_history AS h
WHERE h.minute > '-infinity'::timestamptz AND h.minute < now() - interval '7 days'
LIMIT 10000
FOR UPDATE OF h SKIP LOCKED)))
