"""Tasks that take their first step at once, on every Python and every loop that lets them."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar, copy_context
from typing import Any, Final

import pytest

from sqla_river.eventloop import Start

SEEN: Final[ContextVar[str]] = ContextVar("SEEN", default="nothing")


class _Stubborn(asyncio.SelectorEventLoop):
    """A loop whose call_soon nobody can replace, as those that are written in C."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "call_soon":
            raise AttributeError(name)
        super().__setattr__(name, value)


def _run(loop: asyncio.AbstractEventLoop, work: Callable[[Start], Coroutine[Any, Any, None]]) -> None:
    """Run *work* as the callbacks of a loop run: in no task."""
    start = Start(loop)
    failures: list[BaseException] = []

    def begin() -> None:
        try:
            work(start).send(None)
        except StopIteration:
            loop.stop()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)
            loop.stop()

    try:
        loop.call_soon(begin)
        loop.run_forever()
    finally:
        loop.close()
    assert failures == []


def test_a_task_that_does_not_wait_is_done_when_it_is_begun() -> None:
    async def work(start: Start) -> None:
        seen: list[object] = []

        async def job() -> None:
            current = asyncio.current_task()
            seen.extend([current.get_name() if current is not None else None, SEEN.get()])
            SEEN.set("changed")

        context = copy_context()
        context.run(SEEN.set, "given")
        task = start(job(), "job 1", context)

        assert task.done()
        assert task.exception() is None
        assert seen == ["job 1", "given"]
        assert (context[SEEN], SEEN.get()) == ("changed", "nothing")

    _run(asyncio.SelectorEventLoop(), work)


@pytest.mark.parametrize("kind", [asyncio.SelectorEventLoop, _Stubborn])
def test_a_task_that_waits_goes_on_later(kind: type[asyncio.SelectorEventLoop]) -> None:
    loop = kind()
    steps: list[str] = []

    async def child() -> str:
        return "child"

    async def job() -> None:
        steps.append("first")
        steps.append(await asyncio.create_task(child()))
        await asyncio.sleep(0)
        steps.append("last")
        loop.stop()

    start = Start(loop)
    tasks: list[Awaitable[None]] = []
    loop.call_soon(lambda: tasks.append(start(job(), "job 1", copy_context())))
    loop.run_forever()
    loop.close()

    assert steps == ["first", "child", "last"]
