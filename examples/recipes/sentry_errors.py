"""Each failed attempt as an event in Sentry, without the secrets of its args.

``Runner(engine, workers, queues=..., on_error=report)``, after ``set_up(dsn)``.
"""

from typing import Any, cast

import sentry_sdk
from sentry_sdk.integrations.logging import ignore_logger

from sqla_river import JobContext


def set_up(dsn: str, **options: Any) -> None:
    # Local variables hold the args, secrets among them.
    sentry_sdk.init(dsn, include_local_variables=False, **options)
    ignore_logger("sqla_river.judge")  # it says of each failure what `report` sends


def report(job: JobContext[Any], error: BaseException) -> None:
    """Called after each failed attempt; `Snooze` and `Cancel` are none."""
    with sentry_sdk.new_scope() as scope:
        scope.set_tag("job.kind", job.kind)
        scope.set_tag("job.queue", job.queue)
        scope.set_context("job", {"id": job.id, "attempt": job.attempt, "max_attempts": job.max_attempts})
        scope.add_event_processor(lambda event, _: _hidden(event, job))
        scope.capture_exception(error)


def _hidden(value: Any, job: JobContext[Any]) -> Any:
    """*value*, an event or a part of one, with ``***`` for the values of redacted fields."""
    if isinstance(value, str):
        return job.redact(value)
    if isinstance(value, dict):
        return {key: _hidden(each, job) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_hidden(each, job) for each in cast("list[object]", value)]
    return value
