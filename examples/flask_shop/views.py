"""The page, and what its buttons do. Each view commits once: the rows and the jobs that belong to them."""

from flask import Blueprint, flash, redirect, render_template, request, url_for
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from werkzeug.wrappers import Response

from flask_shop.jobs import AddPoints, CheckPaid, SendEmail, SendSMS
from flask_shop.models import Customer, Order, Payment, Product, Status, db
from flask_shop.river import river
from shop import settings
from sqla_river import Job

POINTS_PER_ITEM = 10

views = Blueprint("shop", __name__)


@views.get("/")
def index() -> str:
    return render_template("shop.html", state=state())


@views.get("/state")
def state() -> str:
    """The part of the page that changes by itself."""
    return render_template(
        "state.html",
        product=db.session.scalars(select(Product)).one(),
        customer=db.session.scalars(select(Customer)).one(),
        orders=db.session.scalars(select(Order).order_by(Order.id.desc()).limit(10)).all(),
        jobs=db.session.scalars(select(Job).order_by(Job.id.desc()).limit(20)).all(),
    )


@views.post("/orders")
def place_order() -> Response:
    """Set the goods aside, and look later whether they were paid."""
    customer, product = db.session.scalars(select(Customer)).one(), db.session.scalars(select(Product)).one()
    quantity = request.form.get("quantity", 1, type=int)
    order = Order(customer_id=customer.id, product_id=product.id, quantity=quantity)
    db.session.add(order)
    set_aside = {"stock": Product.stock - quantity, "reserved": Product.reserved + quantity}
    try:
        db.session.execute(update(Product).where(Product.id == product.id).values(set_aside))
    except IntegrityError:
        db.session.rollback()
        flash("there are not enough of them")
        return redirect(url_for(".index"))
    db.session.flush()  # gives the order its id
    river.enqueue(CheckPaid(order.id), scheduled_at=settings.PAY_WITHIN)
    db.session.commit()
    return redirect(url_for(".index"))


@views.post("/orders/<int:order_id>/payment")
def pay(order_id: int) -> Response:
    """The bank says that an order was paid. It may say so twice."""
    paid = update(Order).where(Order.id == order_id, Order.status == Status.PENDING).values(status=Status.PAID)
    order = db.session.execute(paid.returning(Order.customer_id, Order.product_id, Order.quantity)).one_or_none()
    if order is None:
        flash(f"order {order_id} does not wait for a payment")
        return redirect(url_for(".index"))
    taken = update(Product).where(Product.id == order.product_id)
    db.session.execute(taken.values(reserved=Product.reserved - order.quantity))
    db.session.add(Payment(reference=f"bank-{order_id}", order_id=order_id))
    river.enqueue_many([SendSMS(order_id), SendEmail(order_id)])
    river.enqueue(AddPoints(order.customer_id, POINTS_PER_ITEM * order.quantity))
    db.session.commit()
    return redirect(url_for(".index"))
