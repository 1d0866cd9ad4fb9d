"""The shop's tables, on Flask-SQLAlchemy."""

from enum import StrEnum
from typing import TYPE_CHECKING

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
if TYPE_CHECKING:  # db.Model is made at run time, out of sight of type checkers
    Model = Base
else:
    Model = db.Model


class Status(StrEnum):
    PENDING = "pending"
    PAID = "paid"
    CANCELLED = "cancelled"


class Customer(Model):
    __tablename__ = "customer"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    phone: Mapped[str]
    email: Mapped[str]
    points: Mapped[int] = mapped_column(default=0)


class Product(Model):
    """What is on the shelf, and what is set aside for orders that are not paid yet."""

    __tablename__ = "product"
    __table_args__ = (CheckConstraint("stock >= 0 AND reserved >= 0", name="enough_is_there"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    stock: Mapped[int]
    reserved: Mapped[int] = mapped_column(default=0)


class Order(Model):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey(Customer.id))
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id))
    quantity: Mapped[int]
    status: Mapped[str] = mapped_column(default=Status.PENDING)

    customer: Mapped[Customer] = relationship()
    product: Mapped[Product] = relationship()


class Payment(Model):
    """The bank's reference is the key: no payment is booked twice."""

    __tablename__ = "payment"

    reference: Mapped[str] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
