"""The shop of examples/, on a real PostgreSQL."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import IntegrityError

# Read when the shop is imported.
os.environ |= {
    "SHOP_PAY_WITHIN": "0.5",
    "SHOP_SMS_PAUSE": "0.05",
    "SHOP_EMAIL_PAUSE": "0.05",
    "SHOP_SENDING_TAKES": "0",
}
from shop import gateway, jobs, settings, story
from shop.gateway import Gateway
from shop.jobs import AddPoints, CheckPaid, SendEmail, SendNotice, SendSMS
from shop.models import Booking, Customer, Order, Product, Status, sessions
from shop.payment import payment_callback, place_order
from sqla_river import Job, JobState, Runner

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def shop(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An open shop whose gateways work."""
    story.open_shop(engine)
    monkeypatch.setattr(gateway, "sms", Gateway("SMS"))
    monkeypatch.setattr(gateway, "email", Gateway("e-mail"))
    return engine


@pytest.fixture
def runner(shop: Engine) -> Iterator[Runner]:
    with Runner(shop, jobs.workers, queues=jobs.QUEUES) as running:
        yield running


def place() -> int:
    with sessions.begin() as session:
        customer = Customer(name="Ada", phone="1", email="ada@example.org")
        session.add(customer)
        session.flush()
        return place_order(session, customer, session.scalars(select(Product)).one()).id


def place_and_pay() -> int:
    """In one transaction: between two, a runner might find on a busy machine that the time to pay is over."""
    with sessions.begin() as session:
        customer = Customer(name="Ada", phone="1", email="ada@example.org")
        session.add(customer)
        session.flush()
        order_id = place_order(session, customer, session.scalars(select(Product)).one()).id
        assert payment_callback(session, order_id, "B-1")
        return order_id


def pay(order_id: int, reference: str = "B-1") -> bool:
    with sessions.begin() as session:
        return payment_callback(session, order_id, reference)


def shelf() -> tuple[int, int]:
    with sessions() as session:
        product = session.scalars(select(Product)).one()
        return product.stock, product.reserved


def status(order_id: int) -> str:
    with sessions() as session:
        return session.get_one(Order, order_id).status


def the_job(kind: str) -> Job:
    with sessions() as session:
        return session.scalars(select(Job).where(Job.kind == kind)).one()


def kinds() -> list[str]:
    with sessions() as session:
        return list(session.scalars(select(Job.kind).order_by(Job.id)))


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "waited 60 seconds in vain"
        time.sleep(0.005)


def test_order_sets_goods_aside_and_schedules_a_check() -> None:
    place()

    check = the_job(CheckPaid.kind)
    assert shelf() == (99, 1)
    assert check.state == JobState.SCHEDULED
    assert check.scheduled_at - check.created_at == settings.PAY_WITHIN


def test_payment_takes_the_stock_and_enqueues_in_its_transaction() -> None:
    order_id = place()

    assert pay(order_id)

    assert status(order_id) == Status.PAID
    assert shelf() == (99, 0)
    enqueued = [the_job(args.kind) for args in (SendSMS, SendEmail, AddPoints)]
    assert [job.priority for job in enqueued] == [1, 2, 3]
    assert [job.queue for job in enqueued] == ["notifications", "notifications", "default"]
    assert [job.max_attempts for job in enqueued[:2]] == [3, 5]


def test_payment_that_fails_half_way_leaves_no_order_change_and_no_job() -> None:
    first, second = place(), place()
    pay(first, "B-1")
    before = kinds()

    with pytest.raises(IntegrityError):
        pay(second, "B-1")

    assert status(second) == Status.PENDING
    assert shelf() == (98, 1)
    assert kinds() == before


def test_second_callback_changes_nothing() -> None:
    order_id = place()
    pay(order_id, "B-1")
    before = kinds()

    assert not pay(order_id, "B-2")

    assert shelf() == (99, 0)
    assert kinds() == before


def test_unpaid_order_is_cancelled_and_its_stock_returned(runner: Runner) -> None:
    order_id = place()

    wait_for(lambda: the_job(CheckPaid.kind).state == JobState.COMPLETED)
    assert status(order_id) == Status.CANCELLED
    assert shelf() == (100, 0)
    assert not pay(order_id)


def test_paid_order_outlives_its_check(runner: Runner) -> None:
    order_id = place_and_pay()

    wait_for(lambda: the_job(CheckPaid.kind).state == JobState.COMPLETED)
    assert status(order_id) == Status.PAID
    assert shelf() == (99, 0)


def test_sms_is_tried_again_when_the_gateway_fails(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "sms", Gateway("SMS", failures=1))
    place_and_pay()

    wait_for(lambda: the_job(SendSMS.kind).state == JobState.COMPLETED)
    sms = the_job(SendSMS.kind)
    assert sms.attempt == 2
    assert [error["error"] for error in sms.errors or []] == ["GatewayError: the SMS gateway is out of order"]
    assert len(gateway.sms.sent) == 1


def test_sms_is_discarded_after_three_attempts(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "sms", Gateway("SMS", failures=3))
    order_id = place_and_pay()

    wait_for(lambda: the_job(SendSMS.kind).state == JobState.DISCARDED)
    assert the_job(SendSMS.kind).attempt == 3
    assert status(order_id) == Status.PAID


def test_points_are_added_once_however_often_the_job_runs(runner: Runner) -> None:
    place_and_pay()
    wait_for(lambda: the_job(AddPoints.kind).state == JobState.COMPLETED)

    with sessions.begin() as session:
        again = {"state": JobState.AVAILABLE, "finalized_at": None}
        session.execute(update(Job).where(Job.kind == AddPoints.kind).values(again))
    wait_for(lambda: the_job(AddPoints.kind).attempt == 2 and the_job(AddPoints.kind).state == JobState.COMPLETED)

    with sessions() as session:
        assert session.scalars(select(Customer.points)).one() == 10
        assert session.scalars(select(func.count()).select_from(Booking)).one() == 1


def test_thousand_notices_are_each_sent(runner: Runner) -> None:
    story.enqueue_notices()

    wait_for(lambda: story.notices_left() == 0)
    assert len(gateway.email.sent) == story.NOTICES
    assert kinds().count(SendNotice.kind) == story.NOTICES


def test_retries_wait_as_long_as_the_issue_says() -> None:
    program = """
from shop.jobs import workers
for kind, attempts in ("send_sms", 3), ("send_email", 5):
    worker = workers.get(kind)
    print([worker.retry.delay(attempt).total_seconds() for attempt in range(1, attempts)], worker.timeout)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOP_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == [
        f"[60.0, 120.0] {timedelta(seconds=10)}",
        f"[30.0, 120.0, 480.0, 1920.0] {timedelta(seconds=30)}",
    ]
