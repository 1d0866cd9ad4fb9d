"""`Job`, the mapping of ``river_job``, and `JobMixin`, the same for a Base, MetaData or ``db.Model`` of one's own."""

import json
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Unpack, cast

from sqlalchemy import Column, Connection, FromClause, MetaData, Table, event
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, MappedColumn, Mapper, declared_attr

from sqla_river import notify, store
from sqla_river.args import JobArgs
from sqla_river.config import Settings
from sqla_river.errors import MappingError, UniqueNeedsEnqueueError
from sqla_river.options import OptionWords, check_schema, check_when, said_in
from sqla_river.rows import Heard, InsertRow, expiring, place
from sqla_river.statements import announcing
from sqla_river.states import JobState
from sqla_river.tables import RIVER, job_table, river_job

_here: Final = partial(datetime.now, UTC)


def _check_order(cls: type) -> None:
    owner = next(base for base in cls.__mro__[1:] if "__init__" in vars(base))
    if any(issubclass(base, MappedAsDataclass) for base in cls.__mro__):
        raise MappingError(
            f"{cls.__name__} cannot be a dataclass: a job is made from its args; write "
            f"class {cls.__name__}(JobMixin, RiverBase): metadata = Base.metadata"
        )
    if not issubclass(owner, JobMixin):
        raise MappingError(
            f"{owner.__name__} hides the constructor of a job; write class {cls.__name__}(JobMixin, ...)"
        )


class JobMixin:
    """The columns and the constructor of a job, for a declarative base of one's own.

    Example:
        ``class Job(JobMixin, Base): ...``, or, to keep columns of the Base out,
        ``class Job(JobMixin, RiverBase): metadata = Base.metadata``.

    ``id`` is None until the flush. ``metadata_`` is the column ``metadata``. JSON values are not tracked: assign anew.
    """

    __river_schema__: ClassVar[str | None] = None
    __river__: ClassVar[Settings] = Settings()

    if TYPE_CHECKING:
        metadata: ClassVar[MetaData]
        __table__: ClassVar[FromClause]
        id: Mapped[int]
        state: Mapped[JobState]
        attempt: Mapped[int]
        max_attempts: Mapped[int]
        attempted_at: Mapped[datetime | None]
        created_at: Mapped[datetime]
        finalized_at: Mapped[datetime | None]
        scheduled_at: Mapped[datetime]
        priority: Mapped[int]
        args: Mapped[dict[str, Any]]
        attempted_by: Mapped[list[str] | None]
        errors: Mapped[list[dict[str, Any]] | None]
        kind: Mapped[str]
        metadata_: Mapped[dict[str, Any]]
        queue: Mapped[str]
        tags: Mapped[list[str]]
        unique_key: Mapped[bytes | None]
        unique_states: Mapped[frozenset[JobState] | None]
    else:

        @declared_attr.directive
        def __table__(cls):  # noqa: N805
            _check_order(cls)
            check_schema(cls.__river_schema__ or cls.metadata.schema)
            table = job_table(cls.metadata, cls.__river_schema__)
            theirs = sorted(
                name
                for base in cls.__mro__
                for name, value in vars(base).items()
                if isinstance(value, Column | MappedColumn) and name not in table.c
            )
            if theirs:
                raise MappingError(
                    f"{cls.__name__} gets columns that river_job has not ({', '.join(theirs)}); write "
                    f"class {cls.__name__}(JobMixin, RiverBase): metadata = Base.metadata"
                )
            return table

        @declared_attr.directive
        def __tablename__(cls):  # noqa: N805
            return "river_job"  # Flask-SQLAlchemy would say "job"

    inserted: bool = True
    """False on what `enqueue` of a unique job returns where another one held the key already: that one."""
    _expires: datetime | timedelta | None = None
    _delay: tuple[timedelta, datetime] | None = None
    """The delay that was asked for, and the ``scheduled_at`` that it is taken to mean so far."""
    _heard: Heard | None = None

    def __init__(self, args: JobArgs, *, _row: InsertRow | None = None, **options: Unpack[OptionWords]) -> None:
        """A job that is not in the database yet; `InsertOptions` says what the options mean.

        Raises:
            EncodeError: args that their own types, JSON or PostgreSQL refuse.
            InvalidOptionError: an option outside its rule.
        """
        row = _row or self.__river__.one(args, said_in(options))
        if _row is None and row.unique_at is not None:
            raise UniqueNeedsEnqueueError(
                f"kind {row.kind!r} is unique, and the unit of work has no ON CONFLICT; "
                "write enqueue(session, args) in place of Job(args)"
            )
        # All plain columns, always: 1,000 jobs flush as one INSERT; with columns set here and there, as 1,000.
        self.kind = row.kind
        self.args = json.loads(row.args)
        self.queue = row.queue
        self.priority = row.priority
        self.max_attempts = row.max_attempts
        self.tags = list(row.tags)
        # The flush decides on expiry, state and time by the database's clock; this is what merge() and bulk saves copy.
        self.metadata_ = deepcopy(expiring(row.metadata, row.expires, _here))
        self._expires = row.expires
        if row.pending:
            self.state = JobState.PENDING
        elif row.when is not None:
            self.state = JobState.SCHEDULED
        if isinstance(row.when, timedelta):
            self.scheduled_at = _here() + row.when
            self._delay = row.when, self.scheduled_at
        elif row.when is not None:
            self.scheduled_at = row.when

    def __init_subclass__(cls, **options: Any) -> None:
        _check_order(cls)
        super().__init_subclass__(**options)


for _name in river_job.c.keys():  # noqa: SIM118 - keys, not columns
    setattr(JobMixin, _name, None)  # hides what a user's Base has by that name; else "can't add additional column"


def declared_schema(job_class: type[JobMixin]) -> str | None:
    """The schema that *job_class* names; where it stands on a connection, `store.real_schema` says."""
    return cast("Table", job_class.__table__).schema


class RiverBase(DeclarativeBase):
    """The Base of the shipped `Job`; and of one's own in one's own MetaData, without the columns of one's own Base."""

    metadata = RIVER


class Job(JobMixin, RiverBase):
    """A job, mapped to ``river_job`` in the schema that the search_path (or a ``schema_translate_map``) gives."""


@event.listens_for(JobMixin, "before_insert", propagate=True)
def _place(_: Mapper[Any], connection: Connection, job: JobMixin) -> None:
    """Decide where the job starts, by the database's clock; as plain values: an expression costs an INSERT per row."""
    store.check_postgresql(connection.dialect.name, connection.dialect.driver)
    given, state = vars(job).get("scheduled_at"), vars(job).get("state")
    when = None if given is None else check_when("scheduled_at", given)
    delay, meant = job._delay or (None, None)
    if delay is not None and meant == given:  # nobody has assigned another time since
        when = delay
    found = place(when, state == JobState.PENDING, partial(store.transaction_now, connection))
    if found.at is not None:
        job.scheduled_at = found.at
        if state in {None, JobState.AVAILABLE, JobState.SCHEDULED}:
            job.state = found.state
        if when is delay and delay is not None:
            job._delay = delay, found.at  # added anew after a rollback, it counts from the new now()
    job._heard = Heard.of([(job.queue, found)])
    _announce(connection, job, job._heard)
    if job._expires is not None:
        job.metadata_ = expiring(job.metadata_, job._expires, partial(store.transaction_now, connection))


def _announce(connection: Connection, job: JobMixin, heard: Heard) -> None:
    """Let the INSERT of the first job of a queue announce it; the others of the transaction flush as one."""
    held = vars(job)
    if isinstance(held.get("attempt"), announcing):  # of a flush that failed
        del held["attempt"]
    schema = store.real_schema(connection, declared_schema(type(job)))
    if notify.says(connection, schema, heard, job.__river__.notify):
        # A column that has a server default, so that the flush brings its value back.
        held["attempt"] = announcing(held.get("attempt") or 0, schema, job.queue)


@event.listens_for(JobMixin, "after_insert", propagate=True)
def _tell(_: Mapper[Any], connection: Connection, job: JobMixin) -> None:
    if job._heard is not None:
        schema = store.real_schema(connection, declared_schema(type(job)))
        notify.tell(connection, schema, job._heard, job.__river__.notify)
