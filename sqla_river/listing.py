"""Looking through jobs page by page, along the indexes that there are: by key, never by OFFSET."""

import base64
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, Generic, Literal, TypeVar, cast, get_args

import attrs
from sqlalchemy import ColumnElement, Connection, Select, select, tuple_
from sqlalchemy.orm import Session

from sqla_river.choice import Filter, check_which
from sqla_river.errors import InvalidOptionError
from sqla_river.models import JobMixin
from sqla_river.options import check_when, check_whole, shown
from sqla_river.session import sync_session
from sqla_river.statements.words import state

J = TypeVar("J", bound=JobMixin)

Order = Literal["id", "scheduled_at", "finalized_at"]
LARGEST_PAGE: Final = 10_000


@attrs.frozen
class Page(Generic[J]):
    """Some jobs, and the cursor behind the last of them: None where there are no more."""

    jobs: list[J]
    after: str | None


def page(
    which: Filter | None,
    job_class: type[JobMixin],
    *,
    by: Order = "id",
    descending: bool = True,
    after: str | None = None,
    limit: int = 100,
) -> Select[Any]:
    """The select of one page of *which*, whose own order, limit and offset give way. See `River.list_jobs`."""
    if by not in get_args(Order):
        raise InvalidOptionError("by", f"by must be one of {', '.join(get_args(Order))}, got {shown(by)}")
    chosen = select(job_class) if which is None else check_which(which, job_class)
    if isinstance(chosen, int):
        raise InvalidOptionError("which", f"list_jobs takes a select or a condition, got {chosen}; use session.get")
    keys = _keys(job_class, by)
    # The predicate of the partial index, in so many words: with bound states no plan could use it.
    if by == "scheduled_at":
        chosen = chosen.where(job_class.state.in_([state("retryable"), state("scheduled")]))
    elif by == "finalized_at":
        chosen = chosen.where(job_class.finalized_at.is_not(None))
    if after is not None:
        key, last = tuple_(*keys), tuple_(*_read(after, by, descending=descending))
        chosen = chosen.where(key < last if descending else key > last)
    if list(chosen.get_final_froms()) != [job_class.__table__]:
        # A join may bring a job many times, and the limit counts rows.
        chosen = chosen.with_only_columns(job_class, maintain_column_froms=True).group_by(*keys)
    return (
        chosen.order_by(None)
        .order_by(*(key.desc() if descending else key for key in keys))
        .offset(None)
        .limit(check_whole("limit", limit, LARGEST_PAGE))
    )


def _keys(job_class: type[JobMixin], by: Order) -> list[ColumnElement[Any]]:
    """The columns that a page is in order of."""
    first: list[Any] = [] if by == "id" else [getattr(job_class, by)]
    return [*first, cast("Any", job_class.id)]


def list_jobs(session: Any, which: Filter | None, job_class: type[J], **said: Any) -> Page[J]:
    """See `River.list_jobs`."""
    plain = sync_session(session)
    limit: int = said.get("limit", 100)
    by: Order = said.get("by", "id")
    chosen = page(which, job_class, **said).limit(limit + 1)
    # The keys as columns: objects that the Session has already stay as they were loaded, or as the user changed them.
    found = _load(plain, chosen.add_columns(*_keys(job_class, by)))
    jobs = [row[0] for row in found[:limit]]
    more = len(found) > limit
    return Page(jobs, _cursor(found[limit - 1], by, descending=said.get("descending", True)) if more else None)


def _load(session: Session | Connection, chosen: Select[Any]) -> list[Any]:
    if isinstance(session, Connection):
        with Session(bind=session, join_transaction_mode="rollback_only") as own:
            found = _load(own, chosen)
            own.expunge_all()
            return found
    return list(session.execute(chosen).unique())


def _cursor(row: Sequence[Any], by: Order, *, descending: bool) -> str:
    """Where a page ended, as text for URLs; it says its order too, for in another one it would mean nothing."""
    at: datetime | None = None if by == "id" else row[-2]
    place = [by, descending, row[-1], None if at is None else at.isoformat()]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def _read(cursor: str, by: Order, *, descending: bool) -> list[Any]:
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        told_by, told_descending, job_id, at = json.loads(raw)
        last = [int(job_id)] if by == "id" else [check_when("after", datetime.fromisoformat(at)), int(job_id)]
    except (ValueError, TypeError) as error:
        raise InvalidOptionError("after", f"expected the cursor of a page, got {shown(cursor)}") from error
    if (told_by, told_descending) != (by, descending):
        raise InvalidOptionError(
            "after",
            f"this cursor is of a page by {shown(told_by)}, descending={shown(told_descending)}; go on in that order",
        )
    return last
