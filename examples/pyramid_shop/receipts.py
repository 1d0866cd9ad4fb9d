"""A job that needs Pyramid: a receipt is a page, and has the address of one."""

from typing import Any, ClassVar, cast

import attrs
from pyramid import renderers
from pyramid.threadlocal import get_current_request
from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, Session, mapped_column

from shop.models import Base, Order
from sqla_river import JobContext, Workers

workers = Workers()


class Receipt(Base):
    __tablename__ = "receipt"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), primary_key=True)
    text: Mapped[str]


@attrs.frozen
class WriteReceipt:
    kind: ClassVar[str] = "write_receipt"

    order_id: int


@workers.register(WriteReceipt, transactional=True)
def write_receipt(job: JobContext[WriteReceipt], session: Session) -> None:
    """The receipt commits with the job: there is exactly one."""
    request = cast("Any", get_current_request())
    order = session.get_one(Order, job.args.order_id)
    text = cast("Any", renderers).render("pyramid_shop:templates/receipt.jinja2", {"order": order}, request=request)
    request.dbsession.add(Receipt(order_id=order.id, text=text))  # this is the session that the handler was given
