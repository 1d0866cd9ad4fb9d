"""A few hours in the life of the shop, in a few seconds: what `sqla-river demo` shows."""

from collections.abc import Callable
from typing import Final

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError

from shop.jobs import SendNotice
from shop.models import Base, Customer, Order, Product, sessions
from shop.payment import payment_callback, place_order
from sqla_river import Job, JobState, enqueue_many

Say = Callable[[str], None]

NOTICES: Final = 1_000
UNFINISHED: Final = (
    JobState.AVAILABLE,
    JobState.PENDING,
    JobState.RETRYABLE,
    JobState.RUNNING,
    JobState.SCHEDULED,
)


def open_shop(engine: Engine) -> None:
    """Make the shop's tables, and fill the shelf."""
    sessions.configure(bind=engine)
    Base.metadata.create_all(engine)
    with sessions.begin() as session:
        session.add(Product(name="teapot", stock=100))


def sell(count: int, say: Say) -> None:
    """Take *count* orders. The last is never paid; the first payment of the one before it fails half-way."""
    with sessions.begin() as session:
        product = session.scalars(select(Product)).one()
        orders: list[int] = []
        for number in range(1, count + 1):
            customer = Customer(
                name=f"customer {number}", phone=f"+44 20 7946 {number:04}", email=f"{number}@example.org"
            )
            session.add(customer)
            session.flush()
            orders.append(place_order(session, customer, product).id)
    say(f"{count} orders placed, and with each, in the same transaction, a check of its payment")
    for order_id in orders[:-2]:
        pay(order_id, f"B-{order_id}")
        say(f"order {order_id}: paid; SMS, e-mail and points enqueued in the same transaction")
    if not pay(orders[0], "B-again"):
        say(f"order {orders[0]}: the bank calls a second time; nothing changes")
    fail_half_way(orders[-2], f"B-{orders[0]}", say)
    pay(orders[-2], f"B-{orders[-2]}")
    say(f"order {orders[-2]}: paid, at the second try")
    say(f"order {orders[-1]}: nobody pays")


def pay(order_id: int, reference: str) -> bool:
    """What the view that the bank calls would do."""
    with sessions.begin() as session:
        return payment_callback(session, order_id, reference)


def fail_half_way(order_id: int, used_reference: str, say: Say) -> None:
    """Show that a transaction takes its jobs with it."""
    before = count_jobs()
    try:
        pay(order_id, used_reference)
    except IntegrityError:
        say(f"order {order_id}: the payment fails half-way, for its reference {used_reference} belongs to another")
    with sessions() as session:
        status = session.get_one(Order, order_id).status
    say(f"order {order_id}: still {status}; jobs before: {before}, jobs now: {count_jobs()}")


def count_jobs() -> int:
    with sessions() as session:
        return session.scalars(select(func.count()).select_from(Job)).one()


def enqueue_notices() -> None:
    """A thousand jobs, in one transaction."""
    with sessions.begin() as session:
        notices = (SendNotice(f"{number}@example.org", "the shop moves") for number in range(1, NOTICES + 1))
        enqueue_many(session, notices)


def notices_left() -> int:
    """How many notices are still to be sent."""
    return count_unfinished(SendNotice.kind)


def count_unfinished(*kinds: str) -> int:
    """How many jobs, of *kinds* if any are named, are not finished."""
    unfinished = select(func.count()).select_from(Job).where(Job.state.in_(UNFINISHED))
    with sessions() as session:
        return session.scalars(unfinished.where(Job.kind.in_(kinds)) if kinds else unfinished).one()


def by_kind() -> dict[str, dict[str, int]]:
    """The jobs of each kind by their states, and how many attempts they took."""
    figures = select(Job.kind, Job.state, func.count(), func.sum(Job.attempt))
    kinds: dict[str, dict[str, int]] = {}
    with sessions() as session:
        for kind, state, jobs, attempts in session.execute(figures.group_by(Job.kind, Job.state).order_by(Job.kind)):
            row = kinds.setdefault(kind, {"attempts": 0})
            row[state] = jobs
            row["attempts"] += attempts
    return kinds


def balance() -> str:
    """How the shop stands."""
    with sessions() as session:
        orders = session.execute(select(Order.status, func.count()).group_by(Order.status).order_by(Order.status))
        told = ", ".join(f"{count} {status}" for status, count in orders)
        product = session.scalars(select(Product)).one()
        points = session.scalars(select(func.sum(Customer.points))).one()
    return (
        f"orders: {told}; {product.name}s: {product.stock} on the shelf, {product.reserved} set aside; points: {points}"
    )
