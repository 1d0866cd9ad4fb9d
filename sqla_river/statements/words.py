"""Pieces that several statements share: literals, arrays, the fence, a notification."""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnClause,
    ColumnElement,
    DateTime,
    Dialect,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from sqla_river.tables import river_job


def literal(text: str) -> ColumnClause[Any]:
    """A piece of SQL as it stands: a constant, or what Core has no word for."""
    clause: ColumnClause[Any] = literal_column(text)
    return clause


KEPT_ERRORS: Final = 25
KEPT_TOKENS: Final = 100
SUSPICIOUS: Final[ColumnElement[Any]] = literal("2")
"""Deaths of its runner, from which on a job runs only alone."""

NOW: Final = func.now()
MOMENT: Final = DateTime(timezone=True)

job: Final = river_job
w: Final = job.alias("w")
CTID: Final[ColumnElement[Any]] = literal("river_job.ctid")

# On `state` itself the planner may walk a partial index instead of the primary key or the ctids: 115 ms against 10 ms
# for 1,000 jobs.
STATE_TEXT: Final = cast(job.c.state, Text)


def last_token(of: Any) -> ColumnElement[Any]:
    """The token of the last fetch."""
    return literal(f"{of.name}.attempted_by[cardinality({of.name}.attempted_by)]")


LAST_TOKEN: Final = last_token(job)
STARTED_AT: Final[ColumnElement[Any]] = literal(
    """to_char(river_job.attempted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
)
_no_metadata: Final[ColumnElement[Any]] = literal("'{}'::jsonb")
METADATA: Final = case((func.jsonb_typeof(job.c.metadata_) == literal("'object'"), job.c.metadata_), else_=_no_metadata)
"""The metadata, if it is an object: somebody's array would swallow what is merged into it."""
CANCEL_ASKED: Final[ColumnElement[Any]] = METADATA.op("?")(literal("'cancel_attempted_at'"))


def state(name: str) -> ColumnElement[Any]:
    """A state as a literal: bound as $1, PostgreSQL takes a generic plan that cannot use a partial index (seen on
    15.18).
    """
    return literal(f"'{name}'")


AVAILABLE: Final = state("available")
RUNNING: Final = state("running")
UNREADY: Final = job.c.state.in_([state("retryable"), state("scheduled")])


def array_of(name: str, item: Any) -> ColumnElement[Any]:
    """A bind parameter of many values."""
    return bindparam(name, type_=ARRAY(item))


class _Packed(TypeDecorator[Sequence[Any]]):
    """Many values as the text of one array: psycopg dumps a list item by item, which costs 2 us a job for ids and
    tokens, this 0.1. Numbers and tokens need no escapes.
    """

    impl = Text
    cache_ok = True

    def __init__(self, quote: str) -> None:
        super().__init__()
        self.quote = quote

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> str | None:  # noqa: ARG002 - its face
        if not value:
            return None if value is None else "{}"
        quote = self.quote
        return f"{{{quote}{f'{quote},{quote}'.join(map(str, value))}{quote}}}"


def packed_ids(name: str) -> ColumnElement[Any]:
    """A bind parameter of many ids, cheaper than `array_of`."""
    return cast(bindparam(name, type_=_Packed("")), ARRAY(BigInteger))


def packed_tokens(name: str) -> ColumnElement[Any]:
    """Likewise of many tokens."""
    return cast(bindparam(name, type_=_Packed('"')), ARRAY(Text))


def notification(topic: str, payload: ColumnElement[Any]) -> ColumnElement[Any]:
    """pg_notify on River's channel ``<schema>.<topic>``; a schema of None is the connection's current one."""
    schema = func.coalesce(bindparam("p_schema", type_=Text), func.current_schema())
    return func.pg_notify(schema + literal(f"'.{topic}'"), payload)


def queue_payload(queue: ColumnElement[Any]) -> ColumnElement[Any]:
    """River's payload of an insert: ``{"queue": "<name>"}``."""
    return literal("""'{"queue": '""") + cast(func.to_json(queue), Text) + literal("'}'")


def appended(name: str, kept: int, item: ColumnElement[Any]) -> ColumnElement[Any]:
    """The array column *name* with *item* behind it, its last *kept* items; a nested array, which would raise, begins
    anew.
    """
    whole = job.c[name]
    tail: ColumnElement[Any] = literal(f"river_job.{name}[greatest(cardinality(river_job.{name}) - {kept - 2}, 1):]")
    alone = array([item])
    return case(
        (whole.is_(None), alone),  # the first: what follows costs five times as much
        (func.array_ndims(whole) > literal("1"), alone),
        else_=func.array_append(tail, item),
    )


def fence(of: Any, token: ColumnElement[Any]) -> ColumnElement[bool]:
    """The job is running, and its last fetch is ours. `attempt` is no part of it: a snooze gives it back."""
    return and_(cast(of.c.state, Text) == RUNNING, last_token(of) == token)


class in_bitmask(FunctionElement[bool]):  # noqa: N801 - reads as the function that it is
    """River's function, in the schema of the tables; the predicate of the unique index names it, and so must whoever
    wants that index.
    """

    type = Boolean()
    inherit_cache = True


_function: Final = Table("river_job_state_in_bitmask", MetaData())


@compiles(in_bitmask)
def _compile_in_bitmask(element: in_bitmask, compiler: SQLCompiler, **options: Any) -> str:
    # As a table's name it is placed by the schema_translate_map, which leaves functions alone.
    return f"{compiler.preparer.format_table(_function)}({compiler.process(element.clauses, **options)})"


def holds_key(of: Any, key: ColumnElement[Any]) -> ColumnElement[bool]:
    """The row holds the unique key *key* now: the very predicate of river_job_unique_idx."""
    return and_(
        of.c.unique_key == key,
        of.c.unique_key.is_not(None),
        of.c.unique_states.is_not(None),
        in_bitmask(of.c.unique_states, of.c.state),
    )


def would_take_key(of: Any) -> ColumnElement[bool]:
    """As available the row would take a unique key that it does not hold as what it is now."""
    return and_(
        of.c.unique_key.is_not(None),
        func.get_bit(of.c.unique_states, literal("7")) == literal("1"),
        ~in_bitmask(of.c.unique_states, of.c.state),
    )


def cannot_take_key(of: Any) -> ColumnElement[bool]:
    """Of the rows of *of* that would take a key (``takes``): it is held, or another of them comes first."""
    holder = job.alias("holder")
    return and_(
        of.c.takes,
        or_(
            select(holder.c.id)
            .where(holds_key(holder, of.c.unique_key), holder.c.id != of.c.id)
            .correlate(of)
            .exists(),
            func.row_number().over(partition_by=of.c.unique_key, order_by=of.c.id) > literal("1"),
        ),
    )


LET_GO: Final = func.set_bit(func.set_bit(job.c.unique_states, literal("4"), literal("0")), literal("6"), literal("0"))
"""The mask of a job that ends because its key is taken: without discarded and cancelled, or it could not end either.
The other states stay, for a retry by hand.
"""


def discarded_if(taken: ColumnElement[Any]) -> dict[str, Any]:
    """Values that make a job available, or discard it where its unique key is *taken*."""
    reason: ColumnElement[Any] = literal("""'{"unique_key_conflict": "scheduler_discarded"}'::jsonb""")
    return {
        "state": cast(case((taken, state("discarded")), else_=AVAILABLE), job.c.state.type),
        "finalized_at": case((taken, NOW)),
        "unique_states": case((taken, LET_GO), else_=job.c.unique_states),
        "metadata_": case((taken, METADATA.op("||")(reason)), else_=job.c.metadata_),
    }
