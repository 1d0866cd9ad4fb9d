"""The caller's session: which it is, where its jobs go, and what it is told of Core work."""

import sys
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Table, inspect, select, update
from sqlalchemy.orm import Session, scoped_session

from sqla_river import store
from sqla_river.errors import AsyncSessionError, JobNotFoundError, SessionError
from sqla_river.models import JobMixin

J = TypeVar("J", bound=JobMixin)
AnySession = Session | scoped_session[Any] | Connection


def sync_session(session: Any) -> Session | Connection:
    """The Session or Connection behind *session*.

    Raises:
        AsyncSessionError: for anything of ``sqlalchemy.ext.asyncio``: a call that somebody forgot to await must not
            look like a stored job.
        SessionError: for anything else.
    """
    if isinstance(session, Session | Connection):
        return session
    if type(session).__module__.startswith("sqlalchemy.ext.asyncio") or hasattr(session, "sync_session"):
        raise AsyncSessionError(
            f"this verb is for a plain Session, got {type(session).__name__}; "
            "write 'from sqla_river.asyncio import enqueue' and await it, or, where the River is your own, "
            "import AsyncRiver from there and await AsyncRiver(river).enqueue(...)"
        )
    registry = getattr(session, "registry", None)
    if callable(registry):
        return sync_session(registry())
    raise SessionError(
        f"expected a Session, scoped_session or Connection, got {type(session).__name__}; "
        "write 'with Session(engine) as session' and pass that"
    )


def check_bind(session: Session | Connection, job_class: type[JobMixin]) -> None:
    """Raise `WrongDatabaseError` unless jobs of *job_class* go to PostgreSQL. No round trip."""
    bind = session if isinstance(session, Connection) else session.get_bind(mapper=inspect(job_class))
    store.check_postgresql(bind.dialect.name, bind.dialect.driver)


def connect(session: Session | Connection, job_class: type[JobMixin]) -> Connection:
    """The connection that jobs of *job_class* are written on, in the caller's transaction; pending rows of a Session
    are flushed first.
    """
    if isinstance(session, Connection):
        return session
    session.flush()
    # With a statement that writes, a get_bind that sends reads elsewhere gives the leader: SQLAlchemy's recipe looks at
    # the clause, and knows UPDATE and DELETE only.
    clause = update(cast("Table", job_class.__table__))
    return session.connection(bind_arguments={"mapper": inspect(job_class), "clause": clause})


def mark_changed(session: Session | Connection) -> None:
    """Tell zope.sqlalchemy, if it watches *session*, that there is something to commit: Core work alone it would roll
    back, silently.
    """
    zope: Any = sys.modules.get("zope.sqlalchemy")
    if zope is None or not isinstance(session, Session):
        return
    # By what listens, for it knows its transaction manager. After an abort of a session that is kept, zope has
    # forgotten that session, whose transaction goes on.
    for listener in session.dispatch.after_flush:
        watch: Any = getattr(listener, "__self__", None)
        if isinstance(watch, zope.ZopeTransactionEvents):
            watch.mark_changed(session)
            return
    if session in sys.modules["zope.sqlalchemy.datamanager"]._SESSION_STATE:  # joined by hand
        zope.mark_changed(session)


def load(session: Session | Connection, job_id: int, job_class: type[J], *, lock: bool = False) -> J:
    """The job as it stands now, its row locked if asked for; raises `JobNotFoundError`."""
    if isinstance(session, Connection):
        with Session(bind=session, join_transaction_mode="rollback_only") as own:
            job = load(own, job_id, job_class, lock=lock)
            own.expunge(job)
            return job
    if _routes(session):
        return session.merge(load(connect(session, job_class), job_id, job_class, lock=lock), load=False)
    locked = {"of": job_class} if lock else None
    found = session.get(job_class, job_id, populate_existing=True, with_for_update=locked)
    if found is None:
        raise JobNotFoundError(job_id)
    return found


def load_anew(session: Session, job_ids: Sequence[int], job_class: type[JobMixin]) -> None:
    """Have the objects of *session* show how those jobs stand now. One round trip."""
    chosen = select(job_class).where(job_class.id.in_(job_ids))
    if not _routes(session):
        session.scalars(chosen, execution_options={"populate_existing": True}).all()
        return
    with Session(bind=connect(session, job_class), join_transaction_mode="rollback_only") as own:
        found = own.scalars(chosen).all()
        own.expunge_all()
    for job in found:
        session.merge(job, load=False)


def _routes(session: Session) -> bool:
    """Whether a SELECT of *session* may go to another database than its writes, which it would not see there."""
    get_bind: Any = type(session).get_bind
    return get_bind is not Session.get_bind
