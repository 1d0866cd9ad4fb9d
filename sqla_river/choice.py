"""Which jobs a caller means: one, by its id, or those that a select or a condition chooses."""

from typing import Any, cast

from sqlalchemy import ColumnElement, Select, select

from sqla_river.errors import InvalidOptionError
from sqla_river.models import JobMixin
from sqla_river.options import shown

Filter = Select[Any] | ColumnElement[bool]
"""``select(Job).where(...)``, or its condition alone."""


def check_which(which: Any, job_class: type[JobMixin]) -> int | Select[Any]:
    """*which*, if it is the id of one job or chooses some, as a select.

    Raises:
        InvalidOptionError: anything else. A truth value is what ``job.queue == "mail"`` gives for an object in place of
            the class; a select of another class would be joined to every job of this one.
    """
    if isinstance(which, int) and not isinstance(which, bool):
        return which
    table = job_class.__table__
    if isinstance(which, Select):
        chosen = cast("Select[Any]", which)
        ours = table in chosen.columns_clause_froms
    elif isinstance(which, ColumnElement):
        chosen = select(job_class).where(cast("ColumnElement[bool]", which))
        ours = list(chosen.get_final_froms()) == [table]
    else:
        chosen, ours = select(job_class), False
    if not ours:
        name, given = job_class.__name__, shown(cast("object", which))
        raise InvalidOptionError(
            "which", f"expected the id of a job, select({name}).where(...) or a condition on {name}, got {given}"
        )
    return chosen
