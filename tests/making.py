"""What tests are made of: rows in any state, small args classes, a handler to be held, and waits with a deadline."""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, Final, Literal, TypeVar, cast

import attrs
from psycopg.sql import Literal as SQLLiteral
from sqlalchemy import Connection, Engine, Executable, RowMapping, create_engine, event, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from sqla_river import statements, states
from sqla_river.complete import Completer
from sqla_river.context import JobContext
from sqla_river.execute import Executor
from sqla_river.fetch import Fetcher
from sqla_river.hooks import EVENT_KINDS
from sqla_river.incarnation import Incarnation
from sqla_river.rows import ID, Fetched, JobRow, Result, row_of
from sqla_river.runner import Runner
from sqla_river.states import FINALIZED, JobState, Transition
from sqla_river.store import OwnConnection, map_options
from sqla_river.workers import Workers

T = TypeVar("T")
_numbers = itertools.count()
Where = Engine | Connection | Session
DIALECT: Final = postgresql.psycopg.dialect()  # type: ignore[no-untyped-call]


# ---- args ---------------------------------------------------------------------------


@attrs.frozen
class Count:
    """The args of most test jobs."""

    kind: ClassVar[str] = "count"
    number: int = 0


@attrs.frozen
class Greet:
    """Args of another kind, with another shape."""

    kind: ClassVar[str] = "greet"
    name: str = "you"


# ---- waiting ------------------------------------------------------------------------


def eventually(condition: Callable[[], T], within: float = 30.0, what: str = "") -> T:
    """What *condition* returns, as soon as that is true; it is asked every 5 ms, for *within* seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within} s in vain for {what or getattr(condition, '__name__', condition)}")
        time.sleep(0.005)
    return value


class Gate:
    """A handler that records its jobs, and holds each of them until it is opened or the job is told to end."""

    def __init__(self, *, opened: bool = False) -> None:
        self.started: list[JobContext[Any]] = []
        self.reasons: list[str] = []
        self._open = threading.Event()
        if opened:
            self._open.set()

    def __call__(self, job: JobContext[Any]) -> None:
        self.started.append(job)
        while not self._open.wait(0.005):
            if job.cancelled.is_set():
                self.reasons.append(str(job.cancelled.reason))
                raise Interrupted

    def open(self) -> None:
        self._open.set()

    def wait(self, count: int = 1, within: float = 30.0) -> list[JobContext[Any]]:
        """The jobs that have started, once there are *count*."""
        return (
            eventually(lambda: self.started[:] if len(self.started) >= count else None, within, f"{count} starts") or []
        )


class Interrupted(Exception):
    """A held job was told to end."""


# ---- rows ---------------------------------------------------------------------------

_TYPES: Final = {
    "state": "river_job_state",
    "args": "jsonb",
    "metadata": "jsonb",
    "errors": "jsonb[]",
    "attempted_by": "text[]",
    "tags": "varchar[]",
    "scheduled_at": "timestamptz",
    "attempted_at": "timestamptz",
    "finalized_at": "timestamptz",
    "created_at": "timestamptz",
    "unique_key": "bytea",
    "unique_states": "bit(8)",
}


def _executed(where: Where, sql: str, parameters: Mapping[str, Any]) -> list[RowMapping]:
    if isinstance(where, Engine):
        with where.begin() as connection:
            return _executed(connection, sql, parameters)
    return list(where.execute(text(sql), parameters).mappings())


def _json(value: Any, kind: str | None) -> Any:
    """*value* as text, if it is for a column of JSON and none yet."""
    if kind == "jsonb[]" and not isinstance(value, str):
        return [_json(item, "jsonb") for item in value]
    return json.dumps(value) if kind == "jsonb" and not isinstance(value, str) else value


def make_jobs(
    where: Where,
    count: int = 1,
    *,
    state: JobState | str = JobState.AVAILABLE,
    token: str | None = None,
    due_in: timedelta | None = None,
    finished_ago: timedelta | None = None,
    **columns: Any,
) -> list[int]:
    """Put in *count* equal jobs in *state*, by plain SQL, and return their ids in order.

    Args:
        token: the last entry of ``attempted_by``; a running job without one has the token ``test/1``.
        due_in: ``scheduled_at`` counted from the database's clock; negative lies in the past.
        finished_ago: ``finalized_at`` likewise; a finalized job has ended just now unless said.
        columns: any other column; JSON columns as text or as a value, times as PostgreSQL text.
    """
    state = JobState(state)
    if token is None and state == JobState.RUNNING:
        token = "test/1"
    if token is not None:
        columns.setdefault("attempted_by", [token])
    if state == JobState.RUNNING:
        columns.setdefault("attempt", 1)
        columns.setdefault("attempted_at", "now")
    columns = {"state": state.value, "kind": Count.kind, "args": {}, **columns}
    values: dict[str, str] = {}
    parameters: dict[str, Any] = {"count": count}
    for name, value in columns.items():
        kind = _TYPES.get(name)
        values[name] = f"CAST(:{name} AS {kind})" if kind else f":{name}"
        parameters[name] = _json(value, kind)
    if due_in is not None:
        values["scheduled_at"] = "clock_timestamp() + :due_in"
        parameters["due_in"] = due_in
    if state in FINALIZED and "finalized_at" not in values:
        values["finalized_at"] = "now() - :finished_ago"
        parameters["finished_ago"] = finished_ago or timedelta(0)
    chosen = f"SELECT {', '.join(values.values())} FROM generate_series(1, :count)"
    rows = _executed(where, f"INSERT INTO river_job ({', '.join(values)}) {chosen} RETURNING id", parameters)
    return sorted(row["id"] for row in rows)


def make_job(where: Where, **columns: Any) -> int:
    """One job; see `make_jobs`."""
    return make_jobs(where, 1, **columns)[0]


_SHOWN: Final = """
    SELECT *, scheduled_at - clock_timestamp() AS delay, finalized_at IS NOT NULL AS finalized,
           to_jsonb(errors) AS all_errors, attempted_by[cardinality(attempted_by)] AS token
    FROM river_job
"""


def read_job(where: Where, job_id: int) -> RowMapping:
    """The row of a job, and `delay` (from now until it is due), `finalized`, `token` (the last of ``attempted_by``)."""
    (row,) = _executed(where, f"{_SHOWN} WHERE id = :id", {"id": job_id})
    return row


def read_jobs(where: Where) -> list[RowMapping]:
    """All jobs, by id."""
    return _executed(where, f"{_SHOWN} ORDER BY id", {})


def text_of(where: Where, job_id: int) -> str:
    """The whole row as text, for values that Python has no type for; and its physical place, so a rewrite shows."""
    (row,) = _executed(where, "SELECT ctid::text || j::text AS whole FROM river_job j WHERE id = :id", {"id": job_id})
    return str(row["whole"])


def count_states(where: Where) -> dict[str, int]:
    """How many jobs there are, by state."""
    rows = _executed(where, "SELECT state::text, count(*) AS jobs FROM river_job GROUP BY state", {})
    return {row["state"]: row["jobs"] for row in rows}


def all_are(where: Where, state: str, count: int) -> Callable[[], bool]:
    """A condition: there are *count* jobs, every one of them in *state*."""

    def all_are_so() -> bool:
        return count_states(where) == {state: count}

    all_are_so.__name__ = f"{count} jobs {state}"
    return all_are_so


# ---- stations -----------------------------------------------------------------------


@contextmanager
def opened(engine: Engine, **settings: str) -> Generator[OwnConnection]:
    """A connection as a runner keeps it."""
    own = OwnConnection(engine, None, "test", {"enable_seqscan": "off", **settings})
    try:
        yield own
    finally:
        own.close()


def incarnation(workers: Workers) -> Incarnation:
    """The stations of a runner, put together as a runner would, and never started."""
    runner = Runner(create_engine("postgresql+psycopg://"), workers, queues={"default": 1}, listen=False)
    return Incarnation(runner._orders)


def make_executor(workers: Workers) -> Executor:
    """An executor as a runner has it that somebody listens to; nothing watches its timeouts."""
    stations = incarnation(workers)
    stations.events.subscribe(EVENT_KINDS)
    return stations.executor


def own_settings(role: Literal["fetch", "complete"]) -> Mapping[str, str]:
    """What a runner sets on its connection for *role*."""
    stations = incarnation(Workers())
    own = stations.completer._own if role == "complete" else stations._fetcher._own
    return own._settings


def fetch(
    own: OwnConnection,
    token: str = "test/1",
    *,
    slots: Mapping[str, int] | None = None,
    kinds: Sequence[str] = (Count.kind,),
) -> list[JobRow]:
    """What FETCH_AVAILABLE brings, in the order of the ids."""
    slots = {"default": 100} if slots is None else slots
    asked = {"p_queues": list(slots), "p_slots": list(slots.values()), "p_kinds": list(kinds), "p_token": token}
    return sorted((_row(row, token) for row in own.execute(statements.FETCH_AVAILABLE, asked)), key=lambda row: row.id)


def _row(values: Any, token: str) -> JobRow:
    return JobRow._make((*values, token))


def result(job_id: int, transition: Transition, token: str = "test/1", **columns: Any) -> Result:
    """What came of a job: its transition, and of its row what the completer looks at."""
    row: Any = dict.fromkeys(JobRow._fields)
    row.update({"queue": "default", "kind": Count.kind, "attempt": 1, "max_attempts": 25, "priority": 1, "due": 0.0})
    row.update({"id": job_id, "args": "{}", "metadata": "{}", "token": token, **columns})
    return Result(JobRow(**row), transition)


def ended(job_id: int, transition: Transition | None) -> Result | Fetched:
    """The same, as a completer takes it: with None of a job that just completed, of which nobody wants to know more."""
    if transition is not None:
        return result(job_id, transition)
    fetched: Any = tuple(result(job_id, states.completed()).job)
    return cast("Fetched", fetched)


def make_completer(own: OwnConnection, told: Callable[[int, JobState], object] = lambda _id, _state: None) -> Completer:
    """A completer whose thread is the test; *told* of the id of each job that it wrote, and of what it came to."""

    def completed(rows: Sequence[Fetched]) -> None:
        for row in rows:
            told(row[ID], JobState.COMPLETED)

    def written(results: Sequence[Result], states: Sequence[JobState]) -> None:
        for result, state in zip(results, states, strict=True):
            told(result.job.id, state)

    return Completer(own, wake=lambda: None, completed=completed, written=written, relieved=lambda: None)


def make_fetcher(own: OwnConnection, delivered: list[JobRow], **said: Any) -> Fetcher:
    """A fetcher of the queue ``default`` with 100 slots, whose thread is the test; what it brings is *delivered*."""

    def deliver(rows: list[Fetched]) -> None:
        delivered.extend(map(row_of, rows))

    asked: dict[str, Any] = {
        "slots": {"default": 100},
        "kinds": lambda: [Count.kind],
        "deliver": deliver,
        "give_back": str,
        "ready": lambda: True,
        "written": lambda: True,
        "poll": 1.0,
        "hears": lambda: False,
        "wake": lambda: None,
    }
    return Fetcher(own, "test", **{**asked, **said})


# ---- what the database was told -----------------------------------------------------


@contextmanager
def count_statements(engine: Engine) -> Generator[list[str]]:
    """The statements that *engine* sends while the block runs."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


def compiled(statement: Any) -> str:
    """The SQL of one of our statements, without a schema and broken into lines; the same under every SQLAlchemy."""
    sql = str(statement.compile(dialect=DIALECT, compile_kwargs={"render_postcompile": True}))
    sql = sql.replace("::BIT(8)", "")  # which 2.1 says and 2.0 does not
    words = " ".join(sql.split())
    return _CLAUSE.sub("\n", words) + "\n"


_CLAUSE: Final = re.compile(
    r" (?=(?:FROM|WHERE|LEFT OUTER JOIN|ORDER BY|GROUP BY|LIMIT|FOR UPDATE|RETURNING|SET|VALUES|ON CONFLICT)\b)"
    r"|(?<!OUTER) (?=JOIN\b)"
)


class Plan:
    """A plan that PostgreSQL chose and ran."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.nodes = list(self._walk(root))

    def _walk(self, node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in node.get("Plans", ()):
            yield from self._walk(child)

    @property
    def types(self) -> set[str]:
        """The types of its nodes."""
        return {node["Node Type"] for node in self.nodes}

    @property
    def indexes(self) -> set[str]:
        """The indexes that it uses."""
        return {node["Index Name"] for node in self.nodes if "Index Name" in node}

    def scans(self, table: str) -> list[dict[str, Any]]:
        """The nodes that read *table*."""
        return [node for node in self.nodes if node.get("Relation Name") == table and "Scan" in node["Node Type"]]

    def removed(self, how: Literal["Filter", "Join Filter", "Index Recheck"]) -> int:
        """Rows that were read in vain."""
        return sum(round(node.get(f"Rows Removed by {how}", 0) * node["Actual Loops"]) for node in self.nodes)

    @property
    def buffers(self) -> int:
        """Pages touched."""
        return int(self.nodes[0]["Shared Hit Blocks"] + self.nodes[0]["Shared Read Blocks"])

    def __repr__(self) -> str:
        return " / ".join(f"{node['Node Type']} {node.get('Index Name', '')}".strip() for node in self.nodes)


def explain(
    connection: Connection,
    schema: str | None,
    statement: Executable,
    parameters: Mapping[str, Any],
    *,
    plan: Literal["generic", "custom"],
    settings: Mapping[str, str],
    before: Callable[[], object] | None = None,
) -> Plan:
    """Run *statement* under EXPLAIN ANALYZE, prepared as psycopg would after some uses; its effects are undone.

    Args:
        connection: in a transaction.
        plan: which one to force, unless *settings* decide it.
        settings: of the connection that runs the statement; see `own_settings`.
        before: called between a first execution, when a generic plan is made, and the one that is explained.
    """
    words = str(
        cast("Any", statement).compile(
            dialect=DIALECT,
            schema_translate_map=map_options(schema)["schema_translate_map"] or None,
            compile_kwargs={"render_postcompile": True},
        )
    )
    names: list[str] = []

    def numbered(found: re.Match[str]) -> str:
        if found.group(1) not in names:
            names.append(found.group(1))
        return f"${names.index(found.group(1)) + 1}"

    words = re.sub(r"%\((\w+)\)s", numbered, words).replace("%%", "%")
    raw: Any = connection.connection.dbapi_connection
    given = ", ".join(SQLLiteral(parameters[name]).as_string(raw) for name in names)
    prepared = f"explained_{next(_numbers)}"
    call = f"EXECUTE {prepared}({given})" if names else f"EXECUTE {prepared}"

    def told(sql: str) -> Any:
        return connection.exec_driver_sql(sql.replace("%", "%%"))

    for name, value in {"plan_cache_mode": f"force_{plan}_plan", **settings}.items():
        told(f"SET LOCAL {name} = '{value}'")
    told(f"PREPARE {prepared} AS {words}")
    if before is not None:
        with connection.begin_nested() as undone:
            told(call)
            undone.rollback()
        before()
    with connection.begin_nested() as undone:
        answer = told(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {call}").scalar_one()
        undone.rollback()
    return Plan(answer[0]["Plan"])
