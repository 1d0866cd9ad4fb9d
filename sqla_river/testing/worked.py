"""What a test is told of an attempt."""

import json
from datetime import timedelta
from typing import Any, cast

import attrs

from sqla_river.context import JobContext
from sqla_river.outcomes import Cancel, Snooze
from sqla_river.rows import JobRow
from sqla_river.states import JobState


@attrs.frozen
class Worked:
    """What came of one attempt.

    Attributes:
        row: the job as it was fetched.
        state: where it went; None if its row was gone, or somebody else's, when the attempt ended.
        error: the exception that ended the attempt, if one did; a `Snooze` or `Cancel` too when it was raised.
        outcome: the `Snooze` or `Cancel` that the handler returned or raised, if it did.
        delay: how long a retry or a snooze waits.
        job: what the handler was given; None if it was not called.
    """

    row: JobRow
    state: JobState | None
    error: BaseException | None = None
    outcome: Snooze | Cancel | None = None
    delay: timedelta | None = None
    job: JobContext[Any] | None = None

    @property
    def id(self) -> int:
        return self.row.id

    @property
    def kind(self) -> str:
        return self.row.kind

    @property
    def attempt(self) -> int:
        """Counted from 1."""
        return self.row.attempt

    @property
    def args(self) -> Any:
        """As they were decoded; None if they could not be."""
        return self.job.args if self.job is not None else None

    @property
    def metadata(self) -> dict[str, Any]:
        """The job's metadata, with what the handler assigned."""
        return (
            dict(self.job.metadata) if self.job is not None else cast("dict[str, Any]", json.loads(self.row.metadata))
        )

    @property
    def output(self) -> Any:
        """What the handler gave to ``job.output(...)``; None if nothing."""
        return self.metadata.get("output")

    @property
    def progress(self) -> dict[str, Any] | None:
        """The last ``job.progress(...)``: done, total, note."""
        told = self.job.progressed if self.job is not None else None
        return None if told is None else cast("dict[str, Any]", json.loads(told))

    def __repr__(self) -> str:
        error = f" ({type(self.error).__name__}: {self.error})" if self.error is not None else ""
        return f"<job {self.id} {self.kind} attempt {self.attempt}: {self.state or 'gone'}{error}>"
