"""`River`: the settings, and the verbs of a client."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar, Unpack, cast, overload

from sqlalchemy import Engine

from sqla_river import insert, listing, queues, stats, wait
from sqla_river.admin import JobVerbs
from sqla_river.args import DEFAULT_CODEC, Codec, JobArgs
from sqla_river.choice import Filter
from sqla_river.config import InsertMiddleware, NotifyMode, Settings
from sqla_river.errors import ConfigError
from sqla_river.insert import Inserted, Items
from sqla_river.listing import Order, Page
from sqla_river.models import Job, JobMixin
from sqla_river.options import NOTHING_SAID, InsertOptions, OptionWords, said_in
from sqla_river.queues import QueueInfo
from sqla_river.session import AnySession
from sqla_river.stats import MinuteStats, QueueStats

J = TypeVar("J", bound=JobMixin)
K = TypeVar("K", bound=JobMixin)


class River(JobVerbs[J]):
    """One way to put jobs in: a Job class with its settings. They are written onto the class, so that
    ``session.add(Job(args))`` and ``river.enqueue(session, args)`` are the same.

    Args:
        job_class: the mapping; the shipped `Job` unless said otherwise.
        codec: how args become JSON and back.
        defaults: options that neither a call nor an args class says.
        notify: how runners hear of a job: ``"transaction"`` (a NOTIFY inside the transaction), ``"after_commit"``
            (from a side connection, once it is over: for many commits a second) or ``"off"`` (they poll).
        middleware: around what is put in, the first outermost; see `InsertMiddleware`.

    Raises:
        ConfigError: the class has a River with other settings already.
    """

    @overload
    def __init__(
        self: "River[Job]",
        *,
        codec: Codec = ...,
        defaults: InsertOptions = ...,
        notify: NotifyMode = ...,
        middleware: Sequence[InsertMiddleware] = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        job_class: type[J],
        codec: Codec = ...,
        defaults: InsertOptions = ...,
        notify: NotifyMode = ...,
        middleware: Sequence[InsertMiddleware] = ...,
    ) -> None: ...
    def __init__(
        self,
        *,
        job_class: type[Any] = Job,
        codec: Codec = DEFAULT_CODEC,
        defaults: InsertOptions = NOTHING_SAID,
        notify: NotifyMode = "transaction",
        middleware: Sequence[InsertMiddleware] = (),
    ) -> None:
        settings = Settings(codec=codec, defaults=defaults, notify=notify, middleware=tuple(middleware))
        written = vars(job_class).get("__river__")
        if written is None:
            job_class.__river__ = settings
        elif written != settings:
            raise ConfigError(
                f"{job_class.__name__} has a River with other settings already; "
                "make one River per Job class and pass it on"
            )
        self.job_class: type[J] = job_class

    @classmethod
    def of(cls, job_class: type[K]) -> "River[K]":
        """The River of *job_class*, whatever settings it has or will have."""
        river = cast("River[K]", cls.__new__(cls))
        river.job_class = job_class
        return river

    @property
    def settings(self) -> Settings:
        """The settings, as they stand on the class."""
        return self.job_class.__river__

    def enqueue(
        self,
        session: AnySession,
        args: JobArgs,
        **options: Unpack[OptionWords],
    ) -> J:
        """Put a job into the caller's unit of work: it commits or vanishes with the rows it belongs to.

        Given a Session the job is pending in it, exactly as ``session.add(Job(args))`` would leave it: no round trip
        here, ``id`` is None until the flush. Given a Core Connection it is inserted at once; so is a unique job on any
        session, after a flush, for the database says whether it is new: in three round trips, four with a time. Never
        commits, and opens no savepoint.

        Times are the database's: a timedelta counts from now() of the transaction, which is its start.

        Args:
            session: Session, scoped_session or Connection; for AsyncSession there is ``sqla_river.asyncio``.
            args: an instance of an args class: attrs, dataclass, pydantic or msgspec, with a ``kind``. Encoded now.
            options: queue, priority, max_attempts, tags, metadata, scheduled_at, pending: see `InsertOptions`. What is
                left out or None, the args class and then this River decide.

        Raises:
            EncodeError: args that their declared types, JSON or PostgreSQL refuse.
            InvalidOptionError: an option outside its rule.
            UniqueRaceError: the holder of its unique key ended twice meanwhile, or this transaction cannot see it.
            AsyncSessionError: *session* is an AsyncSession.
            WrongDatabaseError: the session is not bound to PostgreSQL.
        """
        return insert.enqueue(session, args, said_in(options), self.job_class)

    def enqueue_many(self, session: AnySession, items: Items, *, returning: bool = False) -> Inserted:
        """Put many jobs into the caller's transaction, in blocks of 10,000 rows or 8 MiB, few round trips each: two for
        a COPY (one INSERT on other drivers than psycopg 3), one for unique jobs, one to announce new queues.

        Of unique jobs with one key the first is kept. Row-level security refuses COPY, but not `enqueue`.

        Pending rows of the Session are flushed first. A block is whole before any of it is sent, so *items* may be a
        generator that uses the same session; memory stays bounded however long it is. Nothing is committed.

        Args:
            session: as for `enqueue`.
            items: args, or ``(args, InsertOptions(...))``.
            returning: reserve ids and return them, in input order; one more round trip per block.

        Raises:
            EncodeError, InvalidOptionError: as `enqueue`; the message names the position of the item.
        """
        return insert.enqueue_many(session, items, self.job_class, returning=returning)

    def list_jobs(
        self,
        session: AnySession,
        which: Filter | None = None,
        *,
        by: Order = "id",
        descending: bool = True,
        after: str | None = None,
        limit: int = 100,
    ) -> Page[J]:
        """One page of the jobs that a ``select(Job)``, or a condition on it, chooses; all unless said.

        One round trip, along an index, however far the page: by a key, not by OFFSET. What the choice itself costs,
        its conditions decide: the README tells which have an index. As by any select, objects that a Session has
        already are not loaded anew.

        Args:
            session: as for `enqueue`.
            which: as for `cancel`; its own order, limit and offset give way. A job comes once, however often a join
                brings it.
            by: ``"id"``; ``"scheduled_at"``, for jobs that wait for their time (scheduled, retryable; others are left
                out); or ``"finalized_at"``, for finished ones, best of one state.
            descending: the newest, or latest, first.
            after: the `Page.after` of the page before, in the same order.
            limit: 1 to 10,000 jobs.

        Raises:
            InvalidOptionError: an order, limit or cursor that is none.
        """
        return listing.list_jobs(session, which, self.job_class, by=by, descending=descending, after=after, limit=limit)

    def pause(self, session: AnySession, queue: str) -> list[QueueInfo]:
        """Pause one queue, or with ``'*'`` all that there are. Part of the caller's transaction; one round trip.

        No fetch that begins after the commit starts a job of it, on whatever runner: no new one, no retry, nothing that
        comes due. What runs goes on. Jobs can be put in all the while. A queue that no runner has worked yet can be
        paused in advance: it gets its row now; ``'*'`` means the rows that there are now. A pause holds until `resume`,
        however long; to pause again changes nothing.

        Returns:
            The queues meant, as they stand now, by name.

        Raises:
            InvalidOptionError: a name that River does not take.
        """
        return queues.pause(session, queue, self.job_class)

    def resume(self, session: AnySession, queue: str) -> list[QueueInfo]:
        """End the pause of one queue, or with ``'*'`` of all. Part of the caller's transaction; one round trip.

        Runners fetch at once when it commits; those that do not LISTEN within one poll. To resume a queue that is not
        paused changes nothing.

        Returns:
            The queues meant, as they stand now, by name.

        Raises:
            QueueNotFoundError: the queue has no row: nobody has paused it, nor worked it in the last 24 hours.
            InvalidOptionError: a name that River does not take.
        """
        return queues.resume(session, queue, self.job_class)

    def list_queues(self, session: AnySession) -> list[QueueInfo]:
        """The queues that have a row, by name: those that runners work or have worked in the last 24 hours, and those
        that are paused. One round trip.
        """
        return queues.select_all(session, self.job_class)

    def update_queue(self, session: AnySession, queue: str, *, metadata: Mapping[str, Any]) -> QueueInfo:
        """Replace what is noted with a queue, and tell River's clients. Part of the caller's transaction; one round
        trip.

        Args:
            session: as for `enqueue`.
            queue: its name.
            metadata: a JSON object of at most 7,800 bytes.

        Raises:
            QueueNotFoundError: the queue has no row.
            InvalidOptionError: a name that River does not take, or metadata that JSON or PostgreSQL refuse.
        """
        return queues.update(session, queue, metadata, self.job_class)

    def wait_for(self, session: AnySession | Engine, job_id: int, *, timeout: timedelta | None = None) -> J:
        """Wait until a job is completed, cancelled or discarded; the Job, detached, as it stands then.

        It looks on connections of its own: at once, after 20 ms, and then in pauses that double up to 500 ms; at once
        too where this very process finishes the job.

        Args:
            session: a Session or Connection, or the Engine.
            job_id: the job's.
            timeout: None waits for ever.

        Raises:
            WaitTimeoutError: the job goes on.
            JobNotFoundError: no such job, or it was deleted meanwhile.
            UncommittedJobError: the job is not committed yet in that very session, so waiting would be for ever.
        """
        return wait.wait_for(session, job_id, self.job_class, timeout)

    def queue_stats(self, session: AnySession, queue: str) -> QueueStats:
        """How *queue* stands now: what waits, runs and is finished, how old the oldest is, and how fast it goes.

        Two round trips, however many jobs there are: at most 10,000 index entries are read of each live state, and none
        of what is finished. Where there are more, the other queues are looked at in the same way (three more round
        trips), and the figure is an estimate that is named in ``estimated``. Pending rows of a Session are flushed
        first; jobs that the caller's transaction has put in are seen.

        Args:
            session: as for `enqueue`.
            queue: its name; one that nobody has heard of yet is empty.

        Raises:
            InvalidOptionError: a name that River does not take.
        """
        return stats.queue_stats(session, queue, self.job_class)

    def stats_history(self, session: AnySession, queue: str | None, since: datetime | timedelta) -> list[MinuteStats]:
        """What was finished in each minute since then, the one that has begun included, without a gap: for plots.

        One round trip. Minutes are kept for a week; earlier ones are left out.

        Args:
            session: as for `enqueue`.
            queue: its name; None for all queues together.
            since: an aware datetime, or a timedelta back from the database's now().

        Raises:
            InvalidOptionError: a name that River does not take, or a naive datetime.
        """
        return stats.stats_history(session, queue, since, self.job_class)


_river = River.of(Job)
enqueue = _river.enqueue
enqueue_many = _river.enqueue_many
cancel = _river.cancel
pause = _river.pause
resume = _river.resume
list_queues = _river.list_queues
update_queue = _river.update_queue
retry = _river.retry
delete = _river.delete
reschedule = _river.reschedule
change_priority = _river.change_priority
list_jobs = _river.list_jobs
wait_for = _river.wait_for
queue_stats = _river.queue_stats
stats_history = _river.stats_history
