SELECT river_queue.name, river_queue.paused_at, river_queue.metadata, river_queue.created_at, river_queue.updated_at
FROM river_queue
ORDER BY river_queue.name
