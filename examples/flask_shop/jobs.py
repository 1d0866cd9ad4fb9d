"""What the shop does in the background. Each job runs inside an app context: db.session is there as in a view."""

from datetime import timedelta
from typing import ClassVar

import attrs
from sqlalchemy import update
from sqlalchemy.orm import Session

from flask_shop.models import Customer, Order, Product, Status, db
from shop import gateway, settings
from sqla_river import Exponential, InsertOptions, JobContext, Workers

workers = Workers()

QUEUES = {"default": 5, "notifications": 10}
"""Slots of one runner: points wait for no SMS."""


@attrs.frozen
class SendSMS:
    kind: ClassVar[str] = "send_sms"
    options: ClassVar[InsertOptions] = InsertOptions(queue="notifications", priority=1, max_attempts=3)

    order_id: int


@attrs.frozen
class SendEmail:
    kind: ClassVar[str] = "send_email"
    options: ClassVar[InsertOptions] = InsertOptions(queue="notifications", priority=2, max_attempts=5)

    order_id: int


@attrs.frozen
class AddPoints:
    kind: ClassVar[str] = "add_points"
    options: ClassVar[InsertOptions] = InsertOptions(priority=3)

    customer_id: int
    points: int


@attrs.frozen
class CheckPaid:
    kind: ClassVar[str] = "check_paid"

    order_id: int


@workers.register(SendSMS, timeout=timedelta(seconds=10), retry=Exponential(base=settings.SMS_PAUSE, factor=2))
def send_sms(job: JobContext[SendSMS]) -> None:
    phone = db.session.get_one(Order, job.args.order_id).customer.phone
    db.session.close()  # no connection waits with us while the gateway takes its time
    gateway.sms.send(phone, f"order {job.args.order_id} is paid", key=f"sms-{job.id}")


@workers.register(SendEmail, timeout=timedelta(seconds=30), retry=Exponential(base=settings.EMAIL_PAUSE, factor=4))
def send_email(job: JobContext[SendEmail]) -> None:
    address = db.session.get_one(Order, job.args.order_id).customer.email
    db.session.close()
    gateway.email.send(address, f"your receipt for order {job.args.order_id}", key=f"email-{job.id}")


@workers.register(AddPoints, transactional=True)
def add_points(job: JobContext[AddPoints], session: Session) -> None:
    """The points commit together with the job: they are added exactly once. *session* is what db.session leads to."""
    customer = update(Customer).where(Customer.id == job.args.customer_id)
    session.execute(customer.values(points=Customer.points + job.args.points))


@workers.register(CheckPaid, transactional=True)
def check_paid(job: JobContext[CheckPaid], session: Session) -> None:
    """Cancels the order if it still waits for its payment, and puts what was set aside back on the shelf."""
    unpaid = update(Order).where(Order.id == job.args.order_id, Order.status == Status.PENDING)
    cancelled = unpaid.values(status=Status.CANCELLED).returning(Order.product_id, Order.quantity)
    row = session.execute(cancelled).one_or_none()
    if row is not None:
        back = {"stock": Product.stock + row.quantity, "reserved": Product.reserved - row.quantity}
        session.execute(update(Product).where(Product.id == row.product_id).values(back))
