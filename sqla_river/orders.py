"""What a Runner is told."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

import attrs
from sqlalchemy import Engine

from sqla_river.hooks import Around, ErrorHandler, Events, Meters, WorkMiddleware
from sqla_river.live import Queues
from sqla_river.options import Retention
from sqla_river.river import River
from sqla_river.workers import Retry, Workers

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


class RunnerWords(TypedDict, total=False):
    """The keywords of `Runner`, for what makes one."""

    queues: Mapping[str, int]
    river: River[Any] | None
    sessions: Any
    async_engine: "AsyncEngine | None"
    timeout: timedelta | None
    retry: Retry | None
    poll: timedelta
    heartbeat: timedelta
    lease: timedelta
    stop_timeout: timedelta
    retention: Retention
    reindex: bool
    keep_logs: bool
    log_args: bool
    listen: bool | Engine
    middleware: Sequence[WorkMiddleware]
    around: Around | None
    on_error: ErrorHandler | None


@attrs.frozen
class Orders:
    """What a Runner was told; durations in seconds."""

    engine: Engine
    workers: Workers
    queues: Queues
    river: River[Any]
    sessions: Any
    async_engine: "AsyncEngine | None"
    timeout: timedelta | None
    retry: Retry | None
    poll: float
    heartbeat: float
    lease: float
    retention: Retention
    reindex: bool
    keep_logs: bool
    log_args: bool
    listen_engine: Engine | None
    middleware: Sequence[WorkMiddleware]
    around: Around | None
    on_error: ErrorHandler | None
    events: Events
    meters: Meters
