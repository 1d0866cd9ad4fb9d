"""`Workers`: which handler works which kind."""

import inspect
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

import attrs

from sqla_river.args import JobArgs, kind_of
from sqla_river.context import JobContext
from sqla_river.errors import RegistrationError
from sqla_river.options import check_kind
from sqla_river.outcomes import Cancel, Snooze
from sqla_river.policy import RetryPolicy

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

Outcome = Snooze | Cancel | None
Retry = RetryPolicy | Callable[[JobContext[Any]], timedelta | Cancel]
"""A policy object, or a callable of the job whose ``job.error`` is the exception that ended the attempt."""

A = TypeVar("A", bound=JobArgs)
R = TypeVar("R", bound=Outcome | Awaitable[Outcome])
O = TypeVar("O", bound=Outcome)  # noqa: E741
C = TypeVar("C", bound=Awaitable[Outcome])
S = TypeVar("S", bound="Session")
AS = TypeVar("AS", bound="AsyncSession")


class Registers(Protocol[A]):
    """The decorator that `Workers.register` gives: it hands the function back as it was."""

    def __call__(self, handler: Callable[[JobContext[A]], R], /) -> Callable[[JobContext[A]], R]: ...


class RegistersTransactional(Protocol[A]):
    """The same for ``transactional=True``: the handler takes a Session too, an async one an AsyncSession."""

    @overload
    def __call__(self, handler: Callable[[JobContext[A], S], O], /) -> Callable[[JobContext[A], S], O]: ...
    @overload
    def __call__(self, handler: Callable[[JobContext[A], AS], C], /) -> Callable[[JobContext[A], AS], C]: ...


def _seconds(worker: "Worker") -> float | None:
    return None if worker.timeout is None else worker.timeout.total_seconds()


@attrs.frozen
class Worker:
    """One handler, and how it is run. *timeout*, *retry* and *keep_logs* of None mean the runner's."""

    kind: str
    args_type: type[Any]
    handler: Callable[..., Any]
    timeout: timedelta | None = None
    retry: Retry | None = None
    transactional: bool = False
    is_async: bool = False
    keep_logs: bool | None = None
    seconds: float | None = attrs.field(init=False, default=attrs.Factory(_seconds, takes_self=True))
    """The timeout."""


class Workers:
    """A registry of handlers by kind.

    Example::

        workers = Workers()


        @workers.register(SendSMS, timeout=timedelta(seconds=10))
        def send_sms(job: JobContext[SendSMS]) -> None: ...


        @workers.register(AddPoints, transactional=True)
        def add_points(job: JobContext[AddPoints], session: Session) -> None: ...
    """

    def __init__(self) -> None:
        self._by_kind: dict[str, Worker] = {}
        self.async_kinds: set[str] = set()
        """Those whose handler is async."""

    @overload
    def register(
        self,
        args: type[A],
        *,
        transactional: Literal[False] = False,
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        kind_aliases: tuple[str, ...] = (),
        keep_logs: bool | None = None,
    ) -> Registers[A]: ...
    @overload
    def register(
        self,
        args: type[A],
        *,
        transactional: Literal[True],
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        kind_aliases: tuple[str, ...] = (),
        keep_logs: bool | None = None,
    ) -> RegistersTransactional[A]: ...
    def register(
        self,
        args: type[Any],
        *,
        transactional: bool = False,
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        kind_aliases: tuple[str, ...] = (),
        keep_logs: bool | None = None,
    ) -> Any:
        """Work jobs of *args*'s kind with the decorated function, plain (in a thread) or ``async`` (on the runner's
        event loop).

        It returns nothing, or `Snooze`, or `Cancel`; an exception means that the attempt failed.

        Args:
            args: the args class; ``job.args`` is an instance of it.
            transactional: hand the function a Session as well (an AsyncSession to an async one). What it writes there
                and the job's completion commit together: exactly once. Its commit() only flushes, its rollback() fails
                the attempt. A COMMIT through the driver itself is out of reach, and not supported.
            timeout: from the start of the function; then ``job.cancelled`` is set, an async one gets CancelledError.
                None is the runner's.
            retry: when a failed attempt is tried again; None is the runner's policy.
            kind_aliases: other kinds that mean the same: a rename in the course of a rolling deploy.
            keep_logs: whether what ``job.log`` says is kept with the job, under ``river:log``; None is the runner's.

        Raises:
            RegistrationError: a kind that has a worker already, a function that cannot be called so, a timeout of zero
                or less.
        """
        kind = check_kind(kind_of(args))
        if timeout is not None and timeout <= timedelta(0):
            raise RegistrationError(
                f"timeout of kind {kind!r} must be more than zero, got {timeout}; leave it out for the runner's",
            )

        def register(handler: Callable[..., Any], /) -> Callable[..., Any]:
            _check_call(kind, handler, 2 if transactional else 1)
            is_async = any(map(inspect.iscoroutinefunction, (handler, getattr(handler, "__call__", None))))  # noqa: B004
            kinds = (kind, *map(check_kind, kind_aliases))
            self._add(
                [Worker(each, args, handler, timeout, retry, transactional, is_async, keep_logs) for each in kinds]
            )
            return handler

        return register

    def include(self, other: "Workers") -> None:
        """Take over all handlers of *other*.

        Raises:
            RegistrationError: a kind that both have; nothing is taken over then.
        """
        self._add(list(other))

    def _add(self, workers: list[Worker]) -> None:
        for worker in workers:
            known = self._by_kind.get(worker.kind)
            if known is not None:
                name = getattr(known.handler, "__qualname__", known.handler)
                raise RegistrationError(f"kind {worker.kind!r} has a worker already ({name}); one kind has one handler")
        self._by_kind.update({worker.kind: worker for worker in workers})
        self.async_kinds.update(worker.kind for worker in workers if worker.is_async)

    def get(self, kind: str) -> Worker | None:
        """The worker of *kind*, or None."""
        return self._by_kind.get(kind)

    @property
    def kinds(self) -> list[str]:
        """All kinds that have a worker here, in order."""
        return sorted(self._by_kind)

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._by_kind.values()))

    def __len__(self) -> int:
        return len(self._by_kind)


def _check_call(kind: str, handler: Callable[..., Any], given: int) -> None:
    """Raise where *handler* cannot be called with so many positional arguments: better here than in every attempt."""
    try:
        inspect.signature(handler).bind(*range(given))
    except TypeError as error:
        takes = "(job, session)" if given == 2 else "(job)"  # noqa: PLR2004
        name = getattr(handler, "__qualname__", handler)
        raise RegistrationError(f"{name} works kind {kind!r} and must be callable as {takes}: {error}") from None
    except ValueError:
        pass  # a builtin without a signature
