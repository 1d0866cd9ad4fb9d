"""`jobs list`, `show`, `retry`, `cancel` and `delete`."""

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast

import attrs
import click
from sqlalchemy import URL, ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from sqla_river import river
from sqla_river.admin import Changed
from sqla_river.check import require_schema
from sqla_river.cli.database import database_option, engine_for, schema_option, told
from sqla_river.cli.screen import cell, new_console, new_table, printable
from sqla_river.listing import LARGEST_PAGE
from sqla_river.models import Job
from sqla_river.states import JobState

F = TypeVar("F", bound=Callable[..., Any])

COLUMNS: Final = ("id", "state", "kind", "queue", "priority", "attempt", "at")


@attrs.frozen
class Choice:
    """The jobs that the options of a command choose."""

    states: tuple[str, ...]
    queues: tuple[str, ...]
    kinds: tuple[str, ...]
    tags: tuple[str, ...]
    limit: int | None

    @property
    def says_nothing(self) -> bool:
        """Whether it is every job."""
        return not (self.states or self.queues or self.kinds or self.tags)

    def select(self, *more: ColumnElement[bool]) -> Select[Any]:
        """The oldest first."""
        chosen = select(Job).where(*self.conditions(), *more).order_by(Job.id)
        return chosen if self.limit is None else chosen.limit(self.limit)

    def conditions(self) -> list[ColumnElement[bool]]:
        """On Job."""
        found: list[ColumnElement[bool]] = []
        if self.states:
            found.append(Job.state.in_([JobState(state) for state in self.states]))
        if self.queues:
            found.append(Job.queue.in_(self.queues))
        if self.kinds:
            found.append(Job.kind.in_(self.kinds))
        found += [Job.tags.contains([tag]) for tag in self.tags]
        return found


def _choosing(limit: int | None) -> Callable[[F], F]:
    """The options of a `Choice`."""

    def decorate(command: F) -> F:
        several: dict[str, Any] = {"multiple": True, "metavar": "NAME"}
        bounds = click.IntRange(1, None if limit is None else LARGEST_PAGE)
        command = click.option(
            "--limit", type=bounds, default=limit, show_default=limit is not None, help="So many at most."
        )(command)
        command = click.option("--tag", "tags", **several, help="With this tag; with all of them, if repeated.")(
            command
        )
        command = click.option("--kind", "kinds", **several, help="Of this kind; may be repeated.")(command)
        command = click.option("--queue", "queues", **several, help="In this queue; may be repeated.")(command)
        states = click.Choice([state.value for state in JobState])
        return click.option("--state", "states", type=states, multiple=True, help="In this state; may be repeated.")(
            command
        )

    return decorate


_json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_database_option: Final = database_option(required=True, meaning="The database.")
_ids: Final = click.argument("ids", metavar="[ID]...", nargs=-1, type=click.IntRange(0, 2**63 - 1))
_yes_option: Final = click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")


@contextlib.contextmanager
def _session(url: URL, schema: str | None) -> Generator[Session]:
    """A transaction, committed at the end."""
    engine = engine_for(url)
    if schema is not None:
        engine = engine.execution_options(schema_translate_map={None: schema})
    with told(), Session(engine, expire_on_commit=False) as session, session.begin():
        require_schema(session.connection(), schema)
        yield session


@click.group()
def jobs() -> None:
    """Find jobs, and retry, cancel or delete them."""


# ---- looking ---------------------------------------------------------------------------------------------------------


@jobs.command("list")
@_choosing(limit=20)
@click.option("--before", type=int, metavar="ID", help="Older than this job: the last one of the page before.")
@_json_option
@_database_option
@schema_option
def list_(url: URL, schema: str | None, before: int | None, as_json: bool, limit: int, **chosen: Any) -> None:
    """List jobs, the newest first.

    A table on a terminal; in a pipe a line for each, parted by tabs: id, state, kind, queue, priority, attempt, and
    when it is due or has ended.
    """
    conditions = Choice(limit=limit, **chosen).conditions()
    if before is not None:
        conditions.append(Job.id < before)
    with _session(url, schema) as session:
        page = river.list_jobs(session, select(Job).where(*conditions), limit=limit)
        documents = [_document(job) for job in page.jobs]
    console = new_console()
    if as_json:
        click.echo(_json(documents))
    elif not console.is_terminal:
        for job in page.jobs:
            click.echo("\t".join(_cells(job)))
    else:
        table = new_table(console, *COLUMNS)
        for job in page.jobs:
            table.add_row(*map(cell, _cells(job)))
        console.print(table if page.jobs else "no jobs")
        if page.after is not None:
            console.print(f"there are more: --before {page.jobs[-1].id}")


@jobs.command()
@click.argument("job_id", metavar="ID", type=click.IntRange(0, 2**63 - 1))
@click.option("--args", "with_args", is_flag=True, help="Show its args too, secrets included.")
@_json_option
@_database_option
@schema_option
def show(url: URL, schema: str | None, job_id: int, with_args: bool, as_json: bool) -> None:
    """Show one job, with its errors.

    Its args are left out unless --args is given: which of their fields are secret (marked 'redact'), only the class in
    your program knows.
    """
    with _session(url, schema) as session:
        job = session.get(Job, job_id)
        if job is None:
            raise click.ClickException(f"job {job_id} does not exist; it may have been pruned or deleted")
        document = _document(job, whole=True, with_args=with_args)
    if as_json:
        click.echo(_json(document))
        return
    errors: list[Any] = document.pop("errors")
    for name, value in document.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        click.echo(f"{name + ':':15}{printable(text)}" if value is not None else f"{name + ':':15}-")
    if not with_args:
        click.echo(f"{'args:':15}hidden; --args shows them")
    for error in errors:
        for line in _lines(error):
            click.echo(printable(line))


def _lines(error: object) -> Iterator[str]:
    """What there is to read of an element of ``errors``, which the column takes though it be no object."""
    if not isinstance(error, dict):
        yield f"error: {json.dumps(error, ensure_ascii=False)}"
        return
    said = cast("dict[str, Any]", error)
    yield f"error in attempt {said.get('attempt')}, {said.get('at')}: {said.get('error')}"
    yield from (f"    {line}" for line in str(said.get("trace") or "").splitlines())


def _document(job: Job, *, whole: bool = False, with_args: bool = False) -> dict[str, Any]:
    """What there is to say of a job, as JSON has it."""
    names = ["id", "state", "kind", "queue", "priority", "attempt", "max_attempts", "tags"]
    names += ["created_at", "scheduled_at", "attempted_at", "finalized_at"]
    if whole:
        names += ["attempted_by", "metadata_", "errors"]
    if with_args:
        names.append("args")
    found = {name.rstrip("_"): _plain(getattr(job, name)) for name in names}
    if whole:
        found["errors"] = found["errors"] or []
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value.value if isinstance(value, JobState) else value


def _cells(job: Job) -> tuple[str, ...]:
    at = job.finalized_at or job.scheduled_at
    return (
        str(job.id),
        job.state.value,
        printable(job.kind),
        printable(job.queue),
        str(job.priority),
        f"{job.attempt}/{job.max_attempts}",
        f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z",
    )


def _json(value: object) -> str:
    return json.dumps(value).replace("\x7f", "\\u007f")


# ---- acting ----------------------------------------------------------------------------------------------------------


@jobs.command()
@_ids
@_choosing(limit=None)
@_json_option
@_database_option
@schema_option
def retry(url: URL, schema: str | None, ids: tuple[int, ...], as_json: bool, **chosen: Any) -> None:
    """Make jobs available at once, by their IDs or by options, of which --state is one.

    Exit code 1 if any was left, with the reason.
    """
    choice = Choice(**chosen)
    if not ids and not choice.states:
        raise click.UsageError("name jobs by their ids, or say their --state: completed ones would run again, too")
    which = _which(ids, choice, Job.state != JobState.RUNNING)
    _act(river.retry, "retried", url, schema, ids, which, as_json=as_json)


@jobs.command()
@_ids
@_choosing(limit=None)
@_yes_option
@_json_option
@_database_option
@schema_option
def cancel(url: URL, schema: str | None, ids: tuple[int, ...], yes: bool, as_json: bool, **chosen: Any) -> None:
    """Cancel jobs that are not finished, by their IDs or by options. One that runs is told to end.

    Exit code 1 if any was left, with the reason.
    """
    which = _which(ids, Choice(**chosen), Job.finalized_at.is_(None))
    _agree("cancel", url, schema, which, yes=yes)
    _act(river.cancel, "cancelled", url, schema, ids, which, as_json=as_json)


@jobs.command()
@_ids
@_choosing(limit=None)
@_yes_option
@_json_option
@_database_option
@schema_option
def delete(url: URL, schema: str | None, ids: tuple[int, ...], yes: bool, as_json: bool, **chosen: Any) -> None:
    """Delete jobs that do not run, by their IDs or by options.

    Exit code 1 if any was left, with the reason.
    """
    which = _which(ids, Choice(**chosen), Job.state != JobState.RUNNING)
    _agree("delete", url, schema, which, yes=yes)
    _act(river.delete, "deleted", url, schema, ids, which, as_json=as_json)


def _which(ids: Sequence[int], choice: Choice, fit: ColumnElement[bool]) -> Select[Any]:
    """The named ones; or of those that the options choose what is *fit*, so that none is left but for cause."""
    if ids and (not choice.says_nothing or choice.limit is not None):
        raise click.UsageError("name jobs by their ids or choose them by options, not both")
    if ids:
        return select(Job).where(Job.id.in_(ids))
    if choice.says_nothing:
        raise click.UsageError("name jobs by their ids, or choose them by --state, --queue, --kind or --tag")
    return choice.select(fit)


def _agree(verb: str, url: URL, schema: str | None, which: Select[Any], *, yes: bool) -> None:
    """Ask, outside of any transaction; end with exit code 1 if the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{verb} asks on a terminal, and needs --yes where there is none")
    with _session(url, schema) as session:
        count = session.scalars(select(func.count()).select_from(which.subquery())).one()
    if not click.confirm(f"{verb} {_jobs(count)}?", err=True):
        click.echo("nothing done", err=True)
        sys.exit(1)


def _act(
    verb: Any, done: str, url: URL, schema: str | None, ids: Sequence[int], which: Select[Any], *, as_json: bool
) -> None:
    with _session(url, schema) as session:
        there = set(session.scalars(which.with_only_columns(Job.id))) if ids else set[int]()
        changed = cast("Changed", verb(session, which))
    left = {**changed.left, **{job_id: "gone" for job_id in ids if job_id not in there}}
    if as_json:
        click.echo(_json({"count": changed.count, "left": left}))
    else:
        click.echo(f"{done} {_jobs(changed.count)}")
        for job_id, reason in sorted(left.items()):
            click.echo(f"job {job_id} is left as it is: {reason}", err=True)
    if left:
        sys.exit(1)


def _jobs(count: int) -> str:
    return f"{count:,} job" if count == 1 else f"{count:,} jobs"
