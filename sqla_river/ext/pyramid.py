"""Pyramid: ``config.include("sqla_river.ext.pyramid")``. It needs no setting, and no workers.

In a view ``request.enqueue(args, ...)`` and ``request.enqueue_many(items)`` put jobs into the session of the request:
with pyramid_tm and zope.sqlalchemy they commit, or vanish, with the rest of the request.

==========================  ==================  =======================================================
setting                     default             meaning
==========================  ==================  =======================================================
``sqla_river.session``      ``dbsession``       the attribute of the request that is the session
``sqla_river.queues``       ``default=10``      slots of a runner: ``default=10 emails=50``, or lines
``sqla_river.notify``       ``transaction``     see `River`
``sqla_river.schema``       the search_path's   where the tables are; the Job class of that schema is then
                                                ``registry["sqla_river"].river.job_class``
``sqla_river.base_url``     http://localhost    what the URLs that a job's request makes begin with
==========================  ==================  =======================================================

``config.add_river_workers(workers)`` takes a `Workers`, or its dotted name; as often as there are some.
``config.set_river_options(**options)``, once, takes what else a `Runner` is to have, by its keywords: ``stop_timeout``,
``retention``, ``middleware``, a ``river`` of your own, ...

A runner, by ``priver development.ini`` or from `runner`, gives each job a request, made by `pyramid.scripting.prepare`:
``pyramid.threadlocal.get_current_request()``. The runner never uses a session of the web's: its own are made anew for
each job.

- Where pyramid_tm is included, ``request.tm`` is begun before the handler, committed after it, and aborted if it
  raises: Snooze and Cancel returned commit, raised they do not. So what a handler does with ``request.dbsession`` has a
  transaction of its own, which commits a moment before the job is completed: it may happen twice.
- In a transactional job ``request.dbsession`` *is* the session that the handler is given, and commits with the job:
  exactly once. It is not joined to ``request.tm``; what else has joined that is committed before it. A handler that
  ends the transaction of ``request.tm`` fails its attempt, and nothing of it is stored.
- Without pyramid_tm a handler commits ``request.dbsession`` itself, or is transactional.

Finished callbacks of the request are called at the end, whatever happened. An ``async def`` handler gets no request:
Pyramid keeps it by thread, and on an event loop they all share one.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from typing import Any, Final, Unpack, cast

from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_river.args import JobArgs
from sqla_river.config import NotifyMode
from sqla_river.context import JobContext
from sqla_river.errors import ConfigError, TransactionOver
from sqla_river.insert import Inserted, Items
from sqla_river.models import Job, JobMixin, RiverBase
from sqla_river.options import OptionWords
from sqla_river.river import River
from sqla_river.runner import Runner
from sqla_river.session import AnySession, sync_session
from sqla_river.workers import Workers

try:
    from pyramid import scripting, threadlocal
    from pyramid.interfaces import IRequestFactory
    from pyramid.request import Request
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "pyramid":
        raise
    raise ImportError(
        "sqla_river.ext.pyramid needs pyramid; run pip install 'sqla-river[pyramid]'", name="pyramid"
    ) from error

KEY: Final = "sqla_river"
"""Where an application's `PyramidRiver` stands in its registry."""
FACTORY: Final = "dbsession_factory"
"""Where Pyramid's own starter for SQLAlchemy keeps the sessionmaker."""
_PREFIX: Final = "sqla_river."
_SETTINGS: Final = ("base_url", "notify", "queues", "schema", "session")


def includeme(config: Any) -> None:
    """What ``config.include`` calls.

    Raises:
        ConfigError: a setting that there is not, or that cannot be.
    """
    config.registry[KEY] = river = PyramidRiver(config.registry, config.get_settings())
    # After set_river_options: what does not go together fails the start of the application, not its first request.
    config.action(None, lambda: river.river, order=1)
    config.add_directive("add_river_workers", _add_workers)
    config.add_directive("set_river_options", _set_options)
    config.add_request_method(_enqueue, "enqueue")
    config.add_request_method(_enqueue_many, "enqueue_many")


def runner(registry: Any, **options: Any) -> Runner:
    """A Runner of the application, neither opened nor started: for a script, a test, or ``sqla-river work -A``.

    Its engine is the one that the session of a request leads to. Transactional jobs get their sessions from
    ``registry["dbsession_factory"]``, if there is one, else plain ones.

    Args:
        registry: the application's: ``config.registry``, ``request.registry``, or that of `pyramid.paster.bootstrap`.
        options: any keyword of `Runner`, and ``engine``; before those of ``set_river_options`` and the settings.

    Raises:
        ConfigError: the application does not include this, has no workers, or its sessions cannot serve.
        RegistrationError: a kind has two workers.
    """
    return river_of(registry).runner(options)


def river_of(registry: Any) -> "PyramidRiver":
    """What the application of *registry* said; raises `ConfigError` where it includes nothing of ours."""
    try:
        found: PyramidRiver = registry[KEY]
    except KeyError:
        raise ConfigError(
            "this application has no sqla_river; write config.include('sqla_river.ext.pyramid')"
        ) from None
    return found


def parse_queues(text: str) -> dict[str, int]:
    """Slots by queue, from ``default=10 emails=50``; commas and new lines part them too."""
    queues: dict[str, int] = {}
    for each in text.replace(",", " ").split():
        name, _, slots = each.partition("=")
        if not slots.isdecimal() or name in queues:
            raise ConfigError(f"queues are slots by name, each once, as in 'default=10 emails=50', got {text!r}")
        queues[name] = int(slots)
    return queues


class PyramidRiver:
    """What one application said of its jobs: ``registry["sqla_river"]``.

    Attributes:
        workers: those of each call of ``add_river_workers``.
        options: those of ``set_river_options``.
    """

    def __init__(self, registry: Any, settings: Mapping[str, Any]) -> None:
        said = {name.removeprefix(_PREFIX): value for name, value in settings.items() if name.startswith(_PREFIX)}
        unknown = sorted(set(said) - set(_SETTINGS))
        if unknown:
            names = ", ".join(_PREFIX + name for name in _SETTINGS)
            raise ConfigError(f"no such setting: {', '.join(_PREFIX + name for name in unknown)}; there are {names}")
        self.workers: list[Workers] = []
        self.options: dict[str, Any] = {}
        self._registry = registry
        self._session: str = said.get("session", "dbsession")
        self._base_url: str | None = said.get("base_url")
        self._notify: NotifyMode | None = said.get("notify")
        self._schema: str | None = said.get("schema")
        self._queues = parse_queues(said.get("queues", "default=10"))

    @cached_property
    def river(self) -> River[Any]:
        """The `River` of this application's jobs."""
        given: River[Any] | None = self.options.get("river")
        said = [name for name, value in (("notify", self._notify), ("schema", self._schema)) if value is not None]
        if given is not None and said:
            raise ConfigError(
                f"{_PREFIX}{said[0]} and set_river_options(river=...) are both said; "
                "leave the setting out, a River has its own"
            )
        if given is not None:
            return given
        job_class = Job if self._schema is None else _job_class_in(self._schema)
        return River.of(job_class) if self._notify is None else River[Any](job_class=job_class, notify=self._notify)

    def session_of(self, request: Any) -> Any:
        """The session of *request*, as the application made it."""
        try:
            return getattr(request, self._session)
        except AttributeError:
            if hasattr(cast("Any", type(request)), self._session):
                raise  # from within: the application's own
            raise ConfigError(
                f"the request has no {self._session!r}; let the setting sqla_river.session name the attribute that is "
                "your session"
            ) from None

    @contextmanager
    def request(self) -> Generator[Any]:
        """A request as `pyramid.scripting.prepare` makes it, current in this thread until the block ends."""
        request = None
        if self._base_url is not None:
            factory: Any = self._registry.queryUtility(IRequestFactory, default=Request)
            request = factory.blank("/", base_url=self._base_url)
        stacked = cast("Any", threadlocal).manager
        depth = len(stacked.stack)
        try:
            with cast("Any", scripting).prepare(request=request, registry=self._registry) as environment:
                yield environment["request"]
        finally:
            # A root factory or a finished callback that raises leaves the request current, in the thread of a slot.
            while len(stacked.stack) > depth:
                stacked.pop()

    def runner(self, options: Mapping[str, Any]) -> Runner:
        """See the function `runner`."""
        said: dict[str, Any] = {
            "queues": self._queues,
            "sessions": self._registry.get(FACTORY),
            **self.options,
            **options,
        }
        workers = Workers()
        for each in self.workers:  # not before now: handlers may have been registered since
            workers.include(each)
        if not len(workers):
            raise ConfigError("there are no workers; write config.add_river_workers('shop.jobs.workers')")
        engine = said.pop("engine", None) or self._engine()
        sessions = _scoped(said.pop("sessions"))
        if any(worker.transactional for worker in workers):
            _check_not_zoped(sessions)
        around = Around(self, workers, sessions)
        said |= {"river": said.get("river") or self.river, "middleware": (around, *said.get("middleware", ()))}
        return Runner(engine, workers, sessions=sessions, **said)

    def set_session(self, request: Any, session: Session) -> None:
        """Let *session* be the session of *request*."""
        setattr(request, self._session, session)

    def _engine(self) -> Engine:
        """Where the jobs go that a request enqueues."""
        with self.request() as request:
            session = sync_session(self.session_of(request))
            bind: Engine | Connection = (
                session if isinstance(session, Connection) else session.get_bind(mapper=inspect(self.river.job_class))
            )
            return bind.engine


class Around:
    """Middleware that gives each job a request, and a transaction of ``request.tm``, if there is one.

    Args:
        river: of the application.
        workers: of the runner.
        sessions: leads to the session of a transactional job while that runs.
    """

    def __init__(self, river: PyramidRiver, workers: Workers, sessions: "scoped_session[Any]") -> None:
        self._river = river
        self._workers = workers
        self._sessions = sessions

    def work(self, job: JobContext[Any], call_next: Callable[[JobContext[Any]], Any], /) -> Any:
        worker = self._workers.get(job.kind)
        if worker is None or worker.is_async:
            return call_next(job)
        with self._river.request() as request:
            if worker.transactional:
                self._river.set_session(request, self._sessions())
            tm = getattr(request, "tm", None)
            return call_next(job) if tm is None else _committed(tm, job, call_next, own=worker.transactional)


def _committed(tm: Any, job: JobContext[Any], call_next: Callable[[JobContext[Any]], Any], *, own: bool) -> Any:
    """What the handler returns, in a transaction of *tm*; *own* says that the job has one of its own around it."""
    from transaction.interfaces import NoTransaction

    begun = tm.begin()
    try:
        outcome = call_next(job)
        if own:
            _check_goes_on(tm, begun)
        tm.commit()
    except BaseException:
        # Also after a commit that failed, or was refused: what has joined keeps its connections until this.
        with suppress(NoTransaction):
            tm.abort()
        raise
    return outcome


def _check_goes_on(tm: Any, begun: object) -> None:
    from transaction.interfaces import NoTransaction

    with suppress(NoTransaction):  # from a manager in explicit mode
        if tm.get() is begun:
            return
    raise TransactionOver(
        "the handler ended the transaction of request.tm, which that of its job would not have followed; "
        "raise an error to roll back"
    )


def _scoped(sessions: Any) -> "scoped_session[Any]":
    """*sessions*, so that the middleware finds the session which the runner made for a job."""
    given: object = sessions
    if given is None:
        return scoped_session(sessionmaker())
    if isinstance(given, scoped_session):
        return cast("scoped_session[Any]", sessions)
    if isinstance(given, sessionmaker):
        return scoped_session(cast("sessionmaker[Any]", sessions))
    raise ConfigError(f"sessions must be a sessionmaker or a scoped_session, got {type(sessions).__name__}")


def _check_not_zoped(sessions: "scoped_session[Any]") -> None:
    """A session that zope.sqlalchemy watches commits with the transaction manager only, never with the job."""
    with sessions.session_factory() as session:
        watching = (getattr(each, "__self__", None) for each in session.dispatch.before_commit)
        if any(type(each).__module__.startswith("zope.sqlalchemy") for each in watching):
            raise ConfigError(
                f"all sessions of registry[{FACTORY!r}], or of sessions=, are registered with zope.sqlalchemy, and a "
                "transactional job commits by itself; register the session of each request instead, or give the runner "
                "a sessionmaker of its own"
            )


@cache
def _job_class_in(schema: str) -> type[JobMixin]:
    """The shipped Job, in *schema*; one class for all applications of this process."""
    return type(f"Job_{schema}", (JobMixin, RiverBase), {"__river_schema__": schema, "__module__": __name__})


def _add_workers(config: Any, workers: Workers | str) -> None:
    """``config.add_river_workers``.

    Raises:
        ConfigError: it is, or names, something else.
    """
    found: object = config.maybe_dotted(workers)
    if not isinstance(found, Workers):
        raise ConfigError(f"add_river_workers takes a Workers or its dotted name, got {type(found).__name__}")
    river = river_of(config.registry)
    config.action(None, river.workers.append, args=(found,))


def _set_options(config: Any, **options: Any) -> None:
    """``config.set_river_options``; twice is a conflict, as Pyramid has them."""
    river = river_of(config.registry)
    config.action("set_river_options", river.options.update, args=(options,))


def _enqueue(request: Any, args: JobArgs, **options: Unpack[OptionWords]) -> JobMixin:
    """`River.enqueue` on the session of the request."""
    river = river_of(request.registry)
    job: JobMixin = river.river.enqueue(cast("AnySession", river.session_of(request)), args, **options)
    return job


def _enqueue_many(request: Any, items: Items, *, returning: bool = False) -> Inserted:
    """`River.enqueue_many` on the session of the request."""
    river = river_of(request.registry)
    return river.river.enqueue_many(cast("AnySession", river.session_of(request)), items, returning=returning)
