"""Confirm what has been ordered, then end: ``python -m bookshop.work``."""

import time

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from bookshop.database import engine
from bookshop.jobs import workers
from bookshop.models import Order, river
from sqla_river import Runner


def count(*, confirmed: bool) -> int:
    """How many orders there are."""
    with Session(engine) as session:
        return session.scalars(select(func.count()).where(Order.confirmed == confirmed)).one()


with Runner(engine, workers, queues={"default": 5}, river=river):
    while count(confirmed=False):
        time.sleep(0.05)
print(f"{count(confirmed=True)} orders confirmed")
