"""The package root is lazy; a module that bears the name of a public verb would, once imported, stand in the verb's
place.
"""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import sqla_river

MODULES = sorted(module.name for module in pkgutil.walk_packages(sqla_river.__path__, "sqla_river."))
VERBS = (
    "cancel",
    "change_priority",
    "delete",
    "enqueue",
    "enqueue_many",
    "list_jobs",
    "list_queues",
    "pause",
    "queue_stats",
    "reschedule",
    "resume",
    "retry",
    "stats_history",
    "update_queue",
    "wait_for",
)
# The homes of skins need extras of their own.
OPTIONAL = ("sqla_river.ext.", "sqla_river.cli", "sqla_river.testing")


@pytest.fixture(scope="module", autouse=True)
def _everything_imported() -> None:
    for name in MODULES:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ImportError:
            if not name.startswith(OPTIONAL):
                raise


@pytest.mark.parametrize("name", sqla_river.__all__)
def test_each_public_name_is_a_class_or_callable_of_that_name_and_no_module(name: str) -> None:
    value = getattr(sqla_river, name)

    assert callable(value)
    assert not inspect.ismodule(value)
    assert value.__name__ == name


def test_no_public_name_is_the_name_of_a_module() -> None:
    assert not set(sqla_river.__all__) & {name.split(".")[1] for name in MODULES}


def test_the_verbs_of_the_root_are_those_of_the_shipped_job() -> None:
    for name in VERBS:
        verb = getattr(sqla_river, name)
        assert getattr(verb, "__self__").job_class is sqla_river.Job  # noqa: B009


def test_names_are_sorted_and_listed() -> None:
    assert sqla_river.__all__ == sorted(sqla_river.__all__)
    assert set(sqla_river.__all__) <= set(dir(sqla_river))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'enqeue'"):
        sqla_river.enqeue  # type: ignore[attr-defined]  # noqa: B018


def test_the_awaited_verbs_are_coroutine_functions_with_the_names_of_the_plain_ones() -> None:
    from sqla_river import asyncio as awaited

    own = awaited.AsyncRiver(sqla_river.River.of(sqla_river.Job))
    for name in VERBS:
        for verb in (getattr(awaited, name), getattr(own, name)):
            assert inspect.iscoroutinefunction(verb)
            assert verb.__name__ == name


def _loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_the_root_loads_no_orm_and_no_driver() -> None:
    loaded = _loaded_by("import sqla_river")

    assert not loaded & {"sqlalchemy", "psycopg", "psycopg_binary", "attrs", "attr", "cattrs", "alembic", "greenlet"}


def test_importing_the_awaited_verbs_loads_neither_greenlet_nor_a_driver() -> None:
    """SQLAlchemy 2.1 has no asyncio without greenlet, which only the extra brings."""
    loaded = _loaded_by("import sqla_river.asyncio; assert 'sqlalchemy.ext.asyncio' not in sys.modules")

    assert not loaded & {"psycopg", "asyncpg", "psycopg2", "alembic"}
