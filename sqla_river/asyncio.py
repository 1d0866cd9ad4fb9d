"""The verbs, awaited: for AsyncSession, async_scoped_session and AsyncConnection.

Those of this module put in and change the shipped `Job`, as those of ``sqla_river`` do; `AsyncRiver` has them for a
`River` of one's own.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, overload

from sqla_river import wait
from sqla_river.admin import Changed
from sqla_river.choice import Filter
from sqla_river.errors import SessionError
from sqla_river.models import Job, JobMixin
from sqla_river.river import River

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session

    AnyAsyncSession: TypeAlias = AsyncSession | async_scoped_session[Any] | AsyncConnection

P = ParamSpec("P")
T = TypeVar("T")
J = TypeVar("J", bound=JobMixin)
J_co = TypeVar("J_co", bound=JobMixin, covariant=True)


def awaited(
    verb: Callable[Concatenate[Any, P], T],
) -> "Callable[Concatenate[AnyAsyncSession, P], Coroutine[Any, Any, T]]":
    """*verb* as a coroutine function: it runs with the plain session inside, in the greenlet that lets its I/O be
    awaited.
    """

    async def call(session: "AnyAsyncSession", /, *given: P.args, **options: P.kwargs) -> T:
        inner: Any = session if hasattr(session, "run_sync") else getattr(session, "registry", lambda: session)()
        if not hasattr(inner, "run_sync"):
            raise SessionError(
                f"expected an AsyncSession or AsyncConnection, got {type(session).__name__}; "
                "plain ones take the verbs of sqla_river, without await"
            )

        def call_plain(plain: Any) -> T:
            return verb(plain, *given, **options)

        result: T = await inner.run_sync(call_plain)
        return result

    call.__name__ = call.__qualname__ = getattr(verb, "__name__", "verb")
    call.__doc__ = f"`River.{call.__name__}`, awaited."
    return call


class _OnJobs(Protocol[J_co]):
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: int) -> J_co: ...
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: Filter) -> Changed: ...


class _Reschedule(Protocol[J_co]):
    @overload
    async def __call__(
        self, session: "AnyAsyncSession", /, which: int, *, scheduled_at: datetime | timedelta
    ) -> J_co: ...
    @overload
    async def __call__(
        self, session: "AnyAsyncSession", /, which: Filter, *, scheduled_at: datetime | timedelta
    ) -> Changed: ...


class _ChangePriority(Protocol[J_co]):
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: int, *, priority: int) -> J_co: ...
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: Filter, *, priority: int) -> Changed: ...


def _awaited(verb: Any) -> Any:
    """What an overloaded verb becomes when awaited, mypy cannot derive."""
    return awaited(verb)


class AsyncRiver(Generic[J]):
    """The verbs of a `River`, awaited: ``await AsyncRiver(river).enqueue(session, args)``.

    Args:
        river: with its Job class and settings.
    """

    def __init__(self, river: River[J]) -> None:
        self.river = river
        self.enqueue = awaited(river.enqueue)
        self.enqueue_many = awaited(river.enqueue_many)
        self.cancel: _OnJobs[J] = _awaited(river.cancel)
        self.retry: _OnJobs[J] = _awaited(river.retry)
        self.delete: _OnJobs[J] = _awaited(river.delete)
        self.reschedule: _Reschedule[J] = _awaited(river.reschedule)
        self.change_priority: _ChangePriority[J] = _awaited(river.change_priority)
        self.list_jobs = awaited(river.list_jobs)
        self.pause = awaited(river.pause)
        self.resume = awaited(river.resume)
        self.list_queues = awaited(river.list_queues)
        self.update_queue = awaited(river.update_queue)
        self.queue_stats = awaited(river.queue_stats)
        self.stats_history = awaited(river.stats_history)

    async def wait_for(
        self,
        session: "AnyAsyncSession | AsyncEngine",
        job_id: int,
        *,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - the same face as the plain verb
    ) -> J:
        """`River.wait_for`, awaited; the event loop goes on meanwhile."""
        from sqlalchemy.ext.asyncio import AsyncEngine

        job_class = self.river.job_class
        engine = (
            session
            if isinstance(session, AsyncEngine)
            else AsyncEngine(await awaited(wait.engine_of)(session, job_id, job_class))
        )
        finished = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed with the wait unfinished
                loop.call_soon_threadsafe(finished.set)

        with wait.Look(job_id, timeout, wake) as look:
            while True:
                async with engine.connect() as connection:
                    job = await connection.run_sync(look.look, job_class)
                if job is not None:
                    return job
                pause = look.pause()
                with suppress(TimeoutError):
                    await asyncio.wait_for(finished.wait(), pause)
                finished.clear()


_river = AsyncRiver(River.of(Job))
enqueue = _river.enqueue
enqueue_many = _river.enqueue_many
cancel = _river.cancel
retry = _river.retry
delete = _river.delete
reschedule = _river.reschedule
change_priority = _river.change_priority
list_jobs = _river.list_jobs
wait_for = _river.wait_for
pause = _river.pause
resume = _river.resume
list_queues = _river.list_queues
update_queue = _river.update_queue
queue_stats = _river.queue_stats
stats_history = _river.stats_history
