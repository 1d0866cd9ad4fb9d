"""The shop's own table, and the jobs in a schema beside it."""

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqla_river import JobMixin, River


class Base(DeclarativeBase):
    """Of the shop's tables."""


class Job(JobMixin, Base):
    """A job; mapped here so that an order may refer to it."""

    __river_schema__ = "river"


class Order(Base):
    """An order, and the job that confirms it."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    confirmed: Mapped[bool] = mapped_column(default=False)
    job_id: Mapped[int | None] = mapped_column(ForeignKey("river.river_job.id", ondelete="SET NULL"))


river = River(job_class=Job)
