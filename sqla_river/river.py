"""`River`: the settings, and the verbs of a client."""

from typing import Any, Generic, TypeVar, Unpack, overload

from sqlalchemy.orm import Session, scoped_session
from sqlalchemy import Connection

from sqla_river import insert
from sqla_river.args import DEFAULT_CODEC, Codec, JobArgs
from sqla_river.config import NotifyMode, Settings
from sqla_river.errors import ConfigError
from sqla_river.insert import Inserted, Items
from sqla_river.models import Job, JobMixin
from sqla_river.options import NOTHING_SAID, InsertOptions, OptionWords, said_in

J = TypeVar("J", bound=JobMixin)


class River(Generic[J]):
    """One way to put jobs in: a Job class with its settings. They are written onto the class, so that ``session.add(Job(args))`` and
    ``river.enqueue(session, args)`` are the same.

    Args:
        job_class: the mapping; the shipped `Job` unless said otherwise.
        codec: how args become JSON and back.
        defaults: options that neither a call nor an args class says.
        notify: how runners hear of a job: ``"transaction"`` (a NOTIFY inside the transaction), ``"after_commit"`` (from a side
            connection, once it is over: for many commits a second) or ``"off"`` (they poll).

    Raises:
        ConfigError: the class has a River with other settings already.
    """

    @overload
    def __init__(
        self: "River[Job]", *, codec: Codec = ..., defaults: InsertOptions = ..., notify: NotifyMode = ...
    ) -> None: ...
    @overload
    def __init__(
        self, *, job_class: type[J], codec: Codec = ..., defaults: InsertOptions = ..., notify: NotifyMode = ...
    ) -> None: ...
    def __init__(
        self,
        *,
        job_class: type[Any] = Job,
        codec: Codec = DEFAULT_CODEC,
        defaults: InsertOptions = NOTHING_SAID,
        notify: NotifyMode = "transaction",
    ) -> None:
        settings = Settings(codec=codec, defaults=defaults, notify=notify)
        written = vars(job_class).get("__river__")
        if written is None:
            job_class.__river__ = settings
        elif written != settings:
            raise ConfigError(f"{job_class.__name__} has a River with other settings already; make one River per Job class and pass it on")
        self.job_class: type[J] = job_class

    @classmethod
    def of(cls, job_class: type[J]) -> "River[J]":
        """The River of *job_class*, whatever settings it has or will have."""
        river: River[J] = cls.__new__(cls)
        river.job_class = job_class
        return river

    @property
    def settings(self) -> Settings:
        """The settings, as they stand on the class."""
        return self.job_class.__river__

    def enqueue(
        self,
        session: Session | scoped_session[Any] | Connection,
        args: JobArgs,
        **options: Unpack[OptionWords],
    ) -> J:
        """Put a job into the caller's unit of work: it commits or vanishes with the rows it belongs to.

        Given a Session the job is pending in it, exactly as ``session.add(Job(args))`` would leave it: no round trip here, ``id``
        is None until the flush. Given a Core Connection it is inserted at once. Never commits, and opens no savepoint.

        Times are the database's: a timedelta counts from now() of the transaction, which is its start.

        Args:
            session: Session, scoped_session or Connection; for AsyncSession there is ``sqla_river.asyncio``.
            args: an instance of an args class: attrs or dataclass, with a ``kind``. Encoded now.
            options: queue, priority, max_attempts, tags, metadata, scheduled_at, pending: see `InsertOptions`. What is left out
                or None, the args class and then this River decide.

        Raises:
            EncodeError: args that their declared types, JSON or PostgreSQL refuse.
            InvalidOptionError: an option outside its rule.
            AsyncSessionError: *session* is an AsyncSession.
            WrongDatabaseError: the session is not bound to PostgreSQL.
        """
        return insert.enqueue(session, args, said_in(options), self.job_class)

    def enqueue_many(
        self, session: Session | scoped_session[Any] | Connection, items: Items, *, returning: bool = False
    ) -> Inserted:
        """Put many jobs into the caller's transaction, in blocks of 10,000 rows or 8 MiB, one round trip each.

        Pending rows of the Session are flushed first. A block is whole before any of it is sent, so *items* may be a generator
        that uses the same session; memory stays bounded however long it is. Nothing is committed.

        Args:
            items: args, or ``(args, InsertOptions(...))``.
            returning: reserve ids and return them, in input order; one more round trip per block.

        Raises:
            EncodeError, InvalidOptionError: as `enqueue`; the message names the position of the item.
        """
        return insert.enqueue_many(session, items, self.job_class, returning=returning)


_river = River.of(Job)
enqueue = _river.enqueue
enqueue_many = _river.enqueue_many
