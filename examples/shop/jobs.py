"""What the shop does in the background: the args of each kind of job, and who works it.

A job runs at least once: again, if its runner was killed before the outcome was stored. So each handler is written
to do no harm the second time.
"""

from datetime import timedelta
from typing import ClassVar

import attrs
from sqlalchemy import update
from sqlalchemy.dialects.postgresql import insert

from shop import gateway, settings
from shop.models import Booking, Customer, Order, Product, Status, sessions
from sqla_river import Exponential, InsertOptions, JobContext, Workers

workers = Workers()

QUEUES = {"default": 5, "notifications": 10, "notices": 20}
"""Slots of one runner. A thousand notices fill their own queue, and delay nobody's SMS."""


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


@attrs.frozen
class SendNotice:
    kind: ClassVar[str] = "send_notice"
    options: ClassVar[InsertOptions] = InsertOptions(queue="notices", priority=4)

    email: str
    text: str


@workers.register(SendSMS, timeout=timedelta(seconds=10), retry=Exponential(base=settings.SMS_PAUSE, factor=2))
def send_sms(job: JobContext[SendSMS]) -> None:
    with sessions() as session:
        phone = session.get_one(Order, job.args.order_id).customer.phone
    # Outside the session: no connection waits with us while the gateway takes its time.
    gateway.sms.send(phone, f"order {job.args.order_id} is paid", key=f"sms-{job.id}")
    job.log.info("order %d: SMS sent, in attempt %d", job.args.order_id, job.attempt)


@workers.register(SendEmail, timeout=timedelta(seconds=30), retry=Exponential(base=settings.EMAIL_PAUSE, factor=4))
def send_email(job: JobContext[SendEmail]) -> None:
    with sessions() as session:
        address = session.get_one(Order, job.args.order_id).customer.email
    gateway.email.send(address, f"your receipt for order {job.args.order_id}", key=f"email-{job.id}")
    job.log.info("order %d: e-mail sent", job.args.order_id)


@workers.register(AddPoints)
def add_points(job: JobContext[AddPoints]) -> None:
    """Books the points under the job's id, in one transaction with the points themselves."""
    booking = insert(Booking).values(job_id=job.id, customer_id=job.args.customer_id, points=job.args.points)
    with sessions.begin() as session:
        if session.scalar(booking.on_conflict_do_nothing().returning(Booking.job_id)) is None:
            return
        customer = update(Customer).where(Customer.id == job.args.customer_id)
        session.execute(customer.values(points=Customer.points + job.args.points))
    job.log.info("customer %d: %d points added", job.args.customer_id, job.args.points)


@workers.register(CheckPaid)
def check_paid(job: JobContext[CheckPaid]) -> None:
    """Cancels the order if it still waits for its payment, and puts what was set aside back on the shelf."""
    unpaid = update(Order).where(Order.id == job.args.order_id, Order.status == Status.PENDING)
    with sessions.begin() as session:
        cancelled = unpaid.values(status=Status.CANCELLED).returning(Order.product_id, Order.quantity)
        row = session.execute(cancelled).one_or_none()
        if row is None:
            return
        product = update(Product).where(Product.id == row.product_id)
        session.execute(product.values(stock=Product.stock + row.quantity, reserved=Product.reserved - row.quantity))
    job.log.info("order %d: not paid in time, cancelled; %d back on the shelf", job.args.order_id, row.quantity)


@workers.register(SendNotice)
def send_notice(job: JobContext[SendNotice]) -> None:
    gateway.email.send(job.args.email, job.args.text, key=f"notice-{job.id}")
