"""`Workers`: which handler works which kind."""

import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import attrs

from sqla_river.args import JobArgs, kind_of
from sqla_river.context import JobContext
from sqla_river.errors import RegistrationError
from sqla_river.options import check_kind
from sqla_river.outcomes import Cancel, Snooze
from sqla_river.policy import RetryPolicy

Outcome = Snooze | Cancel | None
Retry = RetryPolicy | Callable[[JobContext[Any]], timedelta | Cancel]
"""A policy object, or a callable of the job whose ``job.error`` is the exception that ended the attempt."""

A = TypeVar("A", bound=JobArgs)
R = TypeVar("R", bound=Outcome)


class Registers(Protocol[A]):
    """The decorator that `Workers.register` gives: it hands the function back as it was."""

    def __call__(self, handler: Callable[[JobContext[A]], R], /) -> Callable[[JobContext[A]], R]: ...


@attrs.frozen
class Worker:
    """One handler, and how it is run. *timeout* and *retry* of None mean the runner's."""

    kind: str
    args_type: type[Any]
    handler: Callable[..., Any]
    timeout: timedelta | None = None
    retry: Retry | None = None


class Workers:
    """A registry of handlers by kind.

    Example::

        workers = Workers()


        @workers.register(SendSMS, timeout=timedelta(seconds=10))
        def send_sms(job: JobContext[SendSMS]) -> None: ...
    """

    def __init__(self) -> None:
        self._by_kind: dict[str, Worker] = {}

    def register(
        self,
        args: type[A],
        *,
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        kind_aliases: tuple[str, ...] = (),
    ) -> Registers[A]:
        """Work jobs of *args*'s kind with the decorated function.

        Args:
            args: the args class; ``job.args`` is an instance of it.
            timeout: from the start of the handler; then ``job.cancelled`` is set. None is the runner's.
            retry: when a failed attempt is tried again; None is the runner's policy.
            kind_aliases: other kinds that mean the same: a rename in the course of a rolling deploy.

        Raises:
            RegistrationError: a kind that has a worker already, a handler that cannot be called so, a timeout of zero or less.
        """
        kind = check_kind(kind_of(args))
        if timeout is not None and timeout <= timedelta(0):
            raise RegistrationError(f"timeout of kind {kind!r} must be more than zero, got {timeout}; leave it out for the runner's")

        def register(handler: Callable[[JobContext[A]], R], /) -> Callable[[JobContext[A]], R]:
            if inspect.iscoroutinefunction(handler):
                raise RegistrationError(f"the handler of kind {kind!r} is an async function, and only plain ones are worked so far")
            self._add([Worker(each, args, handler, timeout, retry) for each in (kind, *map(check_kind, kind_aliases))])
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
