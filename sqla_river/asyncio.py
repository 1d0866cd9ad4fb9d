"""The verbs, awaited: for AsyncSession, async_scoped_session and AsyncConnection."""

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from sqla_river import river
from sqla_river.errors import SessionError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

    AnyAsyncSession: TypeAlias = AsyncSession | async_scoped_session[Any] | AsyncConnection

P = ParamSpec("P")
T = TypeVar("T")


def awaited(verb: Callable[Concatenate[Any, P], T]) -> "Callable[Concatenate[AnyAsyncSession, P], Coroutine[Any, Any, T]]":
    """*verb* as a coroutine function: it runs with the plain session inside, in the greenlet that lets its I/O be awaited."""

    async def call(session: "AnyAsyncSession", /, *given: P.args, **options: P.kwargs) -> T:
        inner: Any = session if hasattr(session, "run_sync") else getattr(session, "registry", lambda: session)()
        if not hasattr(inner, "run_sync"):
            raise SessionError(
                f"expected an AsyncSession or AsyncConnection, got {type(session).__name__}; "
                "plain ones take the verbs of sqla_river, without await"
            )
        result: T = await inner.run_sync(lambda plain: verb(plain, *given, **options))
        return result

    call.__name__ = call.__qualname__ = getattr(verb, "__name__", "verb")
    call.__doc__ = f"`River.{call.__name__}`, awaited."
    return call


enqueue = awaited(river.enqueue)
enqueue_many = awaited(river.enqueue_many)
