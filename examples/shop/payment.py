"""What the shop's web views call. Each joins the caller's transaction and leaves the commit to it."""

from sqlalchemy import update
from sqlalchemy.orm import Session

from shop import settings
from shop.jobs import AddPoints, CheckPaid, SendEmail, SendSMS
from shop.models import Customer, Order, Payment, Product, Status
from sqla_river import Job, enqueue

POINTS_PER_ITEM = 10


def place_order(session: Session, customer: Customer, product: Product, quantity: int = 1) -> Order:
    """Set the goods aside, and look later whether they were paid.

    Raises:
        sqlalchemy.exc.IntegrityError: there are not enough of them.
    """
    order = Order(customer_id=customer.id, product_id=product.id, quantity=quantity)
    session.add(order)
    set_aside = {"stock": Product.stock - quantity, "reserved": Product.reserved + quantity}
    session.execute(update(Product).where(Product.id == product.id).values(set_aside))
    session.flush()  # gives the order its id
    enqueue(session, CheckPaid(order.id), scheduled_at=settings.PAY_WITHIN)
    return order


def payment_callback(session: Session, order_id: int, reference: str) -> bool:
    """The bank says that an order was paid.

    Returns:
        False if the order does not wait for a payment: it was paid before, or cancelled.

    Raises:
        sqlalchemy.exc.IntegrityError: the reference belongs to another payment. The caller's rollback undoes all of it,
            jobs too.
    """
    paid = update(Order).where(Order.id == order_id, Order.status == Status.PENDING).values(status=Status.PAID)
    order = session.execute(paid.returning(Order.customer_id, Order.product_id, Order.quantity)).one_or_none()
    if order is None:
        return False
    taken = update(Product).where(Product.id == order.product_id).values(reserved=Product.reserved - order.quantity)
    session.execute(taken)
    enqueue(session, SendSMS(order_id))
    enqueue(session, SendEmail(order_id))
    session.add(Job(AddPoints(order.customer_id, POINTS_PER_ITEM * order.quantity)))  # the same thing, the ORM way
    session.flush()
    session.add(Payment(reference=reference, order_id=order_id))
    session.flush()
    return True
