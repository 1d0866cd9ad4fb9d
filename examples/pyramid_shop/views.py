"""The views. None of them commits: pyramid_tm does, once the view has returned."""

from typing import Any

from pyramid.httpexceptions import HTTPConflict, HTTPNotFound, HTTPSeeOther
from pyramid.response import Response
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from pyramid_shop.receipts import Receipt, WriteReceipt
from shop.jobs import SendNotice
from shop.models import Customer, Order, Product
from shop.payment import payment_callback, place_order
from sqla_river import Job


def includeme(config: Any) -> None:
    config.add_route("home", "/")
    config.add_route("orders", "/orders")
    config.add_route("pay", "/orders/{order_id}/pay")
    config.add_route("receipt", "/orders/{order_id}/receipt")
    config.add_route("notices", "/notices")
    config.add_view(home, route_name="home", renderer="pyramid_shop:templates/home.jinja2")
    config.add_view(place, route_name="orders", request_method="POST")
    config.add_view(pay, route_name="pay", request_method="POST")
    config.add_view(receipt, route_name="receipt")
    config.add_view(send_notices, route_name="notices", request_method="POST")
    config.add_exception_view(sold_out, context=IntegrityError)


def home(request: Any) -> dict[str, Any]:
    session = request.dbsession
    return {
        "product": session.scalars(select(Product)).one(),
        "orders": session.scalars(select(Order).order_by(Order.id.desc()).limit(10)).all(),
        "written": set(session.scalars(select(Receipt.order_id))),
        "jobs": session.scalars(select(Job).order_by(Job.id.desc()).limit(20)).all(),
    }


def place(request: Any) -> Response:
    session = request.dbsession
    place_order(session, session.scalars(select(Customer)).one(), session.scalars(select(Product)).one())
    return HTTPSeeOther(request.route_path("home"))


def pay(request: Any) -> Response:
    order_id = int(request.matchdict["order_id"])
    if not payment_callback(request.dbsession, order_id, reference=f"bank-{order_id}"):
        return HTTPConflict("This order does not wait for a payment.")
    request.enqueue(WriteReceipt(order_id))
    return HTTPSeeOther(request.route_path("home"))


def send_notices(request: Any) -> Response:
    """A hundred to each customer: by COPY, in the transaction of the request."""
    addresses = request.dbsession.scalars(select(Customer.email)).all()
    request.enqueue_many(SendNotice(each, f"offer {number}") for each in addresses for number in range(100))
    return HTTPSeeOther(request.route_path("home"))


def receipt(request: Any) -> Response:
    found = request.dbsession.get(Receipt, int(request.matchdict["order_id"]))
    if found is None:
        raise HTTPNotFound("There is no receipt yet.")
    return Response(found.text)


def sold_out(_error: IntegrityError, _request: Any) -> Response:
    return HTTPConflict("Sold out.")
