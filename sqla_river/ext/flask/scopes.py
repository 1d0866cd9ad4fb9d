"""A session for each job, whatever the scoped_session of the app goes by."""

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from sqlalchemy.orm import scoped_session
from sqlalchemy.util import ScopedRegistry, ThreadLocalRegistry


class _Scope(NamedTuple):
    """The scope of one job: whose it is, what the scope function said where it began, and what it holds."""

    scopes: "JobScopes"
    key: object
    own: ScopedRegistry[Any]


_current: Final[ContextVar[_Scope | None]] = ContextVar("sqla_river_scope", default=None)
_lock: Final = threading.Lock()

if hasattr(os, "register_at_fork"):  # else a child forked while another thread holds it could make no app
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class JobScopes(ScopedRegistry[Any]):
    """The registry of a scoped_session, with a scope more for each job that runs; everywhere else *inner* goes on.

    Async jobs share one thread, so by thread they would share a session, and the end of one would roll back what
    another has yet to commit. Where the scope function tells two places of one job apart (a thread that its handler
    makes, an app context inside of the job's), it still does.
    """

    __slots__ = ("_inner",)

    def __init__(self, inner: ScopedRegistry[Any]) -> None:
        by_thread = isinstance(inner, ThreadLocalRegistry)
        super().__init__(inner.createfunc, threading.get_ident if by_thread else inner.scopefunc)
        self._inner = inner

    @classmethod
    def of(cls, scoped: "scoped_session[Any]") -> "JobScopes":
        """Those of *scoped*, from now on."""
        with _lock:
            scopes = scoped.registry
            if not isinstance(scopes, cls):
                scoped.registry = scopes = cls(scopes)
            return scopes

    @contextmanager
    def one(self) -> Generator[None]:
        """A scope that begins here; its session is closed at the end."""
        own: ScopedRegistry[Any] = ScopedRegistry(self.createfunc, lambda: None)
        before = _current.set(_Scope(self, self.scopefunc(), own))
        try:
            yield
        finally:
            try:
                if own.has():
                    own().close()
            finally:
                _current.reset(before)

    def _here(self) -> ScopedRegistry[Any]:
        scope = _current.get()
        if scope is not None and scope.scopes is self and scope.key == self.scopefunc():
            return scope.own
        return self._inner

    def __call__(self) -> Any:
        return self._here()()

    def has(self) -> bool:
        return self._here().has()

    def set(self, obj: Any) -> None:
        self._here().set(obj)

    def clear(self) -> None:
        self._here().clear()
