"""`FlaskRiver`: the extension."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Final, Generic, TypeVar, Unpack, cast, overload
from weakref import WeakKeyDictionary

from flask import Flask, current_app, has_app_context
from sqlalchemy import Engine, inspect
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import scoped_session

from sqla_river.args import JobArgs
from sqla_river.config import NOTIFY_MODES, NotifyMode
from sqla_river.errors import ConfigError
from sqla_river.ext.flask.commands import commands, parse_slots
from sqla_river.ext.flask.in_process import InProcess
from sqla_river.ext.flask.scopes import JobScopes
from sqla_river.hooks import ErrorHandler
from sqla_river.insert import Inserted, Items
from sqla_river.models import Job, JobMixin, RiverBase, declared_schema
from sqla_river.options import OptionWords, check_schema
from sqla_river.orders import RunnerWords
from sqla_river.river import River
from sqla_river.runner import Runner
from sqla_river.workers import Workers

J = TypeVar("J", bound=JobMixin)

PREFIX: Final = "SQLA_RIVER_"
DEFAULTS: Final[RunnerWords] = {"queues": {"default": 10}}
OURS: Final = frozenset({"river", "sessions", "around"})
"""Keywords of `Runner` that the extension gives itself."""
OF_RUNNER: Final = {f"{PREFIX}{name.upper()}": name for name in RunnerWords.__annotations__ if name not in OURS}
NOTIFY, SCHEMA, IN_PROCESS = f"{PREFIX}NOTIFY", f"{PREFIX}SCHEMA", f"{PREFIX}IN_PROCESS"
QUEUES: Final = f"{PREFIX}QUEUES"
DURATIONS: Final = frozenset(f"{PREFIX}{name}" for name in ("TIMEOUT", "POLL", "HEARTBEAT", "LEASE", "STOP_TIMEOUT"))
OF_COMMAND_LINE: Final = frozenset(
    f"{PREFIX}{name}"
    for name in (
        *("APP", "DATABASE_URL", "LOG_LEVEL", "MAX_JOBS", "MAX_RSS", "METRICS_PORT", "PROCESSES", "SUPERVISOR"),
        *("PG_BIN", "TEST_URL"),
    )
)
"""What else this library reads from the environment: the command ``sqla-river`` and its processes, then the demo and
the test kit. Who takes the whole environment into ``app.config`` has it there too, and means nothing by it.
"""


class FlaskRiver(Generic[J]):
    """sqla_river in a Flask app: ``river = FlaskRiver(app)``, or ``river = FlaskRiver()`` and ``river.init_app(app)``.

    `enqueue` joins the session of the request: ``db.session`` of Flask-SQLAlchemy, or the scoped_session given here.
    A ``class Job(JobMixin, db.Model)`` is found by itself, and its ``__bind_key__`` says which database has the jobs.
    Every job runs inside an app context of its own, async ones too, and has a session of its own, closed at the end,
    whether the scoped_session goes by thread or by app context; what a handler does in other threads is its own
    matter. In a transactional handler (a plain one) the scoped session *is* the session of the job. ``flask river``
    has the commands.

    What is set in ``app.config`` beats what is given here, and an argument of `runner` beats both:

    =========================== =====================================================================================
    ``SQLA_RIVER_QUEUES``       slots of one runner by queue, also as ``"default=10,emails=50"``; ``{"default": 10}``
    ``SQLA_RIVER_NOTIFY``       how runners hear of a job: ``"transaction"``, ``"after_commit"`` or ``"off"``; see
                                `River`
    ``SQLA_RIVER_SCHEMA``       where the tables are, unless a Job class of your own says ``__river_schema__``; the
                                first schema of the search_path
    ``SQLA_RIVER_IN_PROCESS``   work the jobs inside the web server too, for development; False
    ``SQLA_RIVER_TIMEOUT``      of workers that have none of their own: timedelta; None
    ``SQLA_RIVER_RETRY``        of workers that have no policy of their own: `Exponential` or the like; River's
    ``SQLA_RIVER_POLL``         how often to look for jobs that nobody announced; 1 s
    ``SQLA_RIVER_HEARTBEAT``    how often a runner says that it lives; 5 s
    ``SQLA_RIVER_LEASE``        how long a silent runner keeps its jobs; 30 s
    ``SQLA_RIVER_STOP_TIMEOUT`` how long running jobs may go on at a stop; 20 s
    ``SQLA_RIVER_RETENTION``    how long finished jobs stay: `Retention`
    ``SQLA_RIVER_REINDEX``      rebuild the indexes once a day; False
    ``SQLA_RIVER_KEEP_LOGS``    keep what ``job.log`` says with the job; False
    ``SQLA_RIVER_LOG_ARGS``     let the record of a failure carry the args, redacted fields masked; False
    ``SQLA_RIVER_LISTEN``       whether to LISTEN, or the engine to do it on; True
    ``SQLA_RIVER_MIDDLEWARE``   around every handler: a sequence of `WorkMiddleware`
    ``SQLA_RIVER_ON_ERROR``     called with the job and the exception after each failed attempt, as jobs are with an app
                                context and a session of its own
    ``SQLA_RIVER_ASYNC_ENGINE`` for async transactional handlers, whose AsyncSession is on it
    =========================== =====================================================================================

    Durations are timedeltas.

    Args:
        app: the app, unless `init_app` is called with it; after Flask-SQLAlchemy's, or with ``session``.
        workers: the handlers; ``river.workers`` is an empty registry unless given.
        queues: as ``SQLA_RIVER_QUEUES``.
        session: the app's scoped_session, where there is no Flask-SQLAlchemy.
        river: the `River` of a Job class of one's own, with its settings; it makes `enqueue` return that class also
            for a type checker.
        in_process: as ``SQLA_RIVER_IN_PROCESS``. The runner starts with ``flask run``, under its reloader in the child
            only; with any other server at the first request. Not under ``TESTING``.

    Raises:
        ConfigError: settings that there are not, or that do not go together.
        InvalidOptionError: a schema that River's channels cannot carry.
    """

    @overload
    def __init__(
        self: "FlaskRiver[Job]",
        app: Flask | None = ...,
        *,
        workers: Workers | None = ...,
        queues: Mapping[str, int] | None = ...,
        session: "scoped_session[Any] | None" = ...,
        in_process: bool = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        app: Flask | None = ...,
        *,
        river: River[J],
        workers: Workers | None = ...,
        queues: Mapping[str, int] | None = ...,
        session: "scoped_session[Any] | None" = ...,
        in_process: bool = ...,
    ) -> None: ...
    def __init__(
        self,
        app: Flask | None = None,
        *,
        river: River[Any] | None = None,
        workers: Workers | None = None,
        queues: Mapping[str, int] | None = None,
        session: Any = None,
        in_process: bool = False,
    ) -> None:
        given: object = session
        if not isinstance(given, scoped_session | None):
            raise ConfigError(
                f"session= takes a scoped_session, got {type(given).__name__}; "
                "write scoped_session(sessionmaker(engine))"
            )
        self.workers = Workers() if workers is None else workers
        self._given = river
        self._queues = queues
        self._session: scoped_session[Any] | None = session
        self._in_process = in_process
        self._rivers: WeakKeyDictionary[Flask, River[Any] | None] = WeakKeyDictionary()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Attach this to *app*: ``app.extensions["sqla_river"]`` and the commands ``flask river``."""
        _check_config(app, self._given)
        self._rivers[app] = self._given
        app.extensions["sqla_river"] = self
        app.cli.add_command(commands)
        if _config(app).get(IN_PROCESS, self._in_process):
            InProcess(app, self.runner).attach()

    def enqueue(self, args: JobArgs, **options: Unpack[OptionWords]) -> J:
        """`River.enqueue` in the session of the request: the job commits or vanishes with it."""
        app = self._app()
        river: River[J] = self._river(app)
        return river.enqueue(self._scoped(app), args, **options)

    def enqueue_many(self, items: Items, *, returning: bool = False) -> Inserted:
        """`River.enqueue_many` in the session of the request."""
        app = self._app()
        return self._river(app).enqueue_many(self._scoped(app), items, returning=returning)

    @property
    def session(self) -> "scoped_session[Any]":
        """The scoped session that `enqueue` joins."""
        return self._scoped(self._app())

    @property
    def river(self) -> River[J]:
        """The `River` of the app: its verbs, and ``job_class``."""
        return self._river(self._app())

    @property
    def engine(self) -> Engine:
        """The engine of the database that has the jobs."""
        app = self._app()
        with app.app_context(), self._scoped(app).session_factory() as session:
            job_class = self._river(app).job_class
            try:
                engine: Engine = session.get_bind(mapper=inspect(job_class)).engine
            except UnboundExecutionError as error:
                raise ConfigError(
                    f"the session of {app.name!r} leads to no database for {job_class.__name__} ({error}); "
                    "bind it to an engine"
                ) from error
        return engine

    def runner(self, app: Flask | None = None, **overrides: Unpack[RunnerWords]) -> Runner:
        """A `Runner` of the app, for scripts and tests: ``with river.runner(): ...``.

        Args:
            app: the app; the current one, or the only one, unless given.
            overrides: keywords of `Runner`.

        Raises:
            ConfigError: settings that do not go together; no app, or no session.
        """
        if app is not None:
            with app.app_context():
                return self.runner(**overrides)
        app = self._app()
        config = _config(app)
        said: Any = {**DEFAULTS}
        if self._queues is not None:
            said["queues"] = self._queues
        said |= {name: _checked(key, config[key]) for key, name in OF_RUNNER.items() if key in config}
        scoped = self._scoped(app)
        said |= {"river": self._river(app), "sessions": scoped, "around": _surroundings(app, scoped), **overrides}
        if said.get("on_error") is not None:
            said["on_error"] = _in_context(app, scoped, said["on_error"])
        return Runner(self.engine, self.workers, **said)

    def _app(self) -> Flask:
        if has_app_context():
            app = cast("Any", current_app)._get_current_object()
            if app in self._rivers:
                return cast("Flask", app)
            raise ConfigError(f"this FlaskRiver is not attached to the app {app.name!r}; call init_app(app)")
        apps = list(self._rivers)
        if len(apps) != 1:
            raise ConfigError(
                f"this FlaskRiver is attached to {len(apps)} apps, and none of them is current; "
                "write 'with app.app_context():' around it"
            )
        return apps[0]

    def _scoped(self, app: Flask) -> "scoped_session[Any]":
        if self._session is not None:
            return self._session
        db = app.extensions.get("sqlalchemy")
        if db is None:
            raise ConfigError(
                f"the app {app.name!r} has no session: call Flask-SQLAlchemy's init_app(app), "
                "or give FlaskRiver(session=scoped_session(...))"
            )
        return cast("scoped_session[Any]", db.session)

    def _river(self, app: Flask) -> River[Any]:
        """The River of *app*. Without one given it is made when first asked for, when all models are there."""
        river = self._rivers[app]
        if river is None:
            schema: str | None = _config(app).get(SCHEMA)
            job_class = _found(app.extensions.get("sqlalchemy")) or (Job if schema is None else _job_in(schema))
            if schema not in {None, declared_schema(job_class)}:
                raise _schema_error(job_class, schema)
            notify: NotifyMode | None = _config(app).get(NOTIFY)
            river = River.of(job_class) if notify is None else River(job_class=job_class, notify=notify)
            self._rivers[app] = river
        return river


def _config(app: Flask) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", app.config)


def _check_config(app: Flask, river: River[Any] | None) -> None:
    known = {*OF_RUNNER, NOTIFY, SCHEMA, IN_PROCESS}
    config = _config(app)
    unknown = sorted(key for key in config if key.startswith(PREFIX) and key not in known | OF_COMMAND_LINE)
    if unknown:
        raise ConfigError(f"no such settings: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    schema, notify = check_schema(config.get(SCHEMA)), config.get(NOTIFY)
    if notify not in {None, *NOTIFY_MODES}:
        raise ConfigError(f"{NOTIFY} must be one of {', '.join(NOTIFY_MODES)}, got {notify!r}")
    if river is not None:
        if notify not in {None, river.settings.notify}:
            raise ConfigError(
                f"{NOTIFY} is {notify!r}, and the River given to FlaskRiver says {river.settings.notify!r}; "
                "leave one of them out"
            )
        if schema not in {None, declared_schema(river.job_class)}:
            raise _schema_error(river.job_class, schema)


def _checked(key: str, value: Any) -> Any:
    """*value*, if it is of a type that the Runner can judge: from the environment come strings and bare numbers."""
    given: object = value
    if key in DURATIONS and not isinstance(given, timedelta | None):
        raise ConfigError(f"{key} must be a timedelta, got {value!r}")
    if key == QUEUES and not isinstance(given, Mapping):
        try:
            return parse_slots(cast("str", given))
        except (ValueError, AttributeError):
            raise ConfigError(
                f"{key} must be slots by queue, as in {{'default': 10}} or 'default=10', got {value!r}"
            ) from None
    return value


def _schema_error(job_class: type[JobMixin], schema: str | None) -> ConfigError:
    return ConfigError(
        f"{SCHEMA} is {schema!r}, and {job_class.__name__} is in {declared_schema(job_class)!r}; "
        f"leave the setting out, or write __river_schema__ = {schema!r} in the class"
    )


def _found(db: Any) -> type[JobMixin] | None:
    """The Job that the user mapped on ``db.Model``, if there is one."""
    mappers: Any = db.Model.registry.mappers if db is not None else ()
    found = [mapper.class_ for mapper in mappers if issubclass(mapper.class_, JobMixin)]
    if len(found) > 1:
        names = ", ".join(sorted(each.__name__ for each in found))
        raise ConfigError(
            f"db.Model has more than one Job class ({names}); give FlaskRiver(river=River(job_class=...))"
        )
    return found[0] if found else None


@cache
def _job_in(schema: str) -> type[JobMixin]:
    """The shipped Job in a schema of its own."""
    return type(f"Job_in_{schema}", (JobMixin, RiverBase), {"__river_schema__": schema})


def _surroundings(app: Flask, scoped: "scoped_session[Any]") -> Callable[[], AbstractContextManager[None]]:
    scopes = JobScopes.of(scoped)

    @contextmanager
    def inside_of_the_app() -> Generator[None]:
        with app.app_context():
            try:
                with scopes.one():
                    yield
            finally:
                scoped.remove()  # what a retry policy, say, has opened in this thread, outside of any job

    return inside_of_the_app


def _in_context(app: Flask, scoped: "scoped_session[Any]", on_error: ErrorHandler) -> ErrorHandler:
    scopes = JobScopes.of(scoped)

    def asked(job: Any, error: BaseException) -> Any:
        with app.app_context(), scopes.one():
            return on_error(job, error)

    return asked
