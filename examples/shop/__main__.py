"""`python -m shop`: makes the shop's tables, places two orders and pays for one of them."""

from shop.models import Base, Customer, Product, sessions
from shop.payment import payment_callback, place_order
from shop.worker import engine

Base.metadata.create_all(engine)
with sessions.begin() as session:
    customer = Customer(name="Ada", phone="+44 20 7946 0001", email="ada@example.org")
    product = Product(name="teapot", stock=10)
    session.add_all([customer, product])
    session.flush()
    paid, unpaid = place_order(session, customer, product).id, place_order(session, customer, product).id
with sessions.begin() as session:
    payment_callback(session, paid, reference=f"bank-{paid}")
print(f"placed orders {paid} and {unpaid}, paid {paid}")
