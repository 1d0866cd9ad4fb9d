"""What the shop does in the background."""

from typing import ClassVar

import attrs
from sqlalchemy import update
from sqlalchemy.orm import Session

from bookshop.database import engine
from bookshop.models import Order
from sqla_river import JobContext, Workers


@attrs.frozen
class Confirm:
    """Confirm an order."""

    kind: ClassVar[str] = "confirm_order"
    order_id: int


workers = Workers()


@workers.register(Confirm)
def confirm(job: JobContext[Confirm]) -> None:
    with Session(engine) as session, session.begin():
        session.execute(update(Order).where(Order.id == job.args.order_id).values(confirmed=True))
