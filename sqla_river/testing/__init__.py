"""For tests of programs that enqueue and work jobs, on real PostgreSQL: with pytest (whose plugin is `plugin`),
unittest or anything else.

The names are loaded when they are first used: pytest imports this package in every run. For AsyncSession there is
``sqla_river.testing.asyncio``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqla_river.testing.databases import rolled_back
    from sqla_river.testing.inline import drain, work_one
    from sqla_river.testing.looking import Wanted, assert_enqueued, refute_enqueued
    from sqla_river.testing.worked import Worked

__all__ = ["Wanted", "Worked", "assert_enqueued", "drain", "refute_enqueued", "rolled_back", "work_one"]

if not TYPE_CHECKING:
    _HOMES = {
        "databases": ("rolled_back",),
        "inline": ("drain", "work_one"),
        "looking": ("Wanted", "assert_enqueued", "refute_enqueued"),
        "worked": ("Worked",),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'sqla_river.testing' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"sqla_river.testing.{home}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted(__all__)
