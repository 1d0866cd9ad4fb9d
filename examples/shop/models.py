"""The shop's own tables, and its sessions: `sessions.configure(bind=engine)` once, where the program starts."""

from enum import StrEnum

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker

sessions = sessionmaker()


class Status(StrEnum):
    PENDING = "pending"
    PAID = "paid"
    CANCELLED = "cancelled"


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    phone: Mapped[str]
    email: Mapped[str]
    points: Mapped[int] = mapped_column(default=0)


class Product(Base):
    """What is on the shelf, and what is set aside for orders that are not paid yet."""

    __tablename__ = "product"
    __table_args__ = (CheckConstraint("stock >= 0 AND reserved >= 0", name="enough_is_there"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    stock: Mapped[int]
    reserved: Mapped[int] = mapped_column(default=0)


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey(Customer.id))
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id))
    quantity: Mapped[int]
    status: Mapped[str] = mapped_column(default=Status.PENDING)

    customer: Mapped[Customer] = relationship()


class Payment(Base):
    """The bank's reference is the key: no payment is booked twice."""

    __tablename__ = "payment"

    reference: Mapped[str] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))


class Booking(Base):
    """Which jobs have added their points: so that one that runs twice adds them once."""

    __tablename__ = "booking"

    job_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer_id: Mapped[int] = mapped_column(ForeignKey(Customer.id))
    points: Mapped[int]
