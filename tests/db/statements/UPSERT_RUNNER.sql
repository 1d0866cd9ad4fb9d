INSERT INTO river_runner (id, queues, slots, free, version, lease)
VALUES (%(p_id)s::VARCHAR, %(p_queues)s::TEXT[], %(p_slots)s::INTEGER[], %(p_free)s::TEXT[], %(p_version)s::VARCHAR, %(p_lease)s)
ON CONFLICT (id) DO UPDATE
SET heartbeat_at = now(), queues = %(p_queues)s::TEXT[], slots = %(p_slots)s::INTEGER[], free = %(p_free)s::TEXT[], lease = %(p_lease)s
RETURNING now() AS now_1
