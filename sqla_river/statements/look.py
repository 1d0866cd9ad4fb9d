"""Looking at the queues."""

from typing import Final

from sqlalchemy import Text, cast, func, select

from sqla_river.statements.words import job

# Caller: stats.py. Index: none; it reads the whole table.
COUNT_STATES: Final = (
    select(job.c.queue, cast(job.c.state, Text).label("state"), func.count().label("jobs"))
    .group_by(job.c.queue, job.c.state)
    .order_by(job.c.queue, job.c.state)
)
