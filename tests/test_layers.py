"""The floors of the house: every import of ours lands on a strictly lower floor, type-only and lazy imports
included.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sqla_river"

FLOORS: list[set[str]] = [
    {"errors", "states", "ddl", "logs", "signals"},  # 0 words and data; signals; standard library only
    {
        "outcomes",
        "failure",
        "policy",
        "rows",
        "codec",
        "unique",
        "loop",
        "refusal",
        "aside",
    },  # 1 plain values and pure rules; threads
    {
        "options",
        "tables",
        "joblog",
        "redact",
        "urls",
    },  # 2 what is allowed; Table objects; secrets, and the log of a job
    {"args", "context", "statements"},  # 3 encode and decode; what a handler sees; every statement
    {"config", "workers", "hooks", "store", "embedded"},  # 4 settings; registry; the door for statements
    {"notify", "bulk", "schema", "listen", "judge"},  # 5 the other doors: only doors execute SQL; what failures ask for
    {"models"},  # 6 the mapping, and its listeners
    {"session", "choice"},  # 7 the caller's session; which jobs are meant
    {"insert", "admin", "listing", "queues", "wait", "stats", "check", "health"},  # 8 the stations of a client
    {
        "fetch",
        "admission",
        "execute",
        "slots",
        "eventloop",
        "watch",
        "settle",
        "complete",
        "counters",
        "heartbeat",
        "duties",
        "live",
    },  # 9 a worker's
    {"river", "held"},  # 10 assembly of the client; the jobs that a runner holds
    {"asyncio", "orders", "stopping"},  # 11 its awaited twin; what a worker is told, and how it ends
    {"incarnation"},  # 12 assembly of the worker, which alone knows everybody
    {"runner"},  # 13 the face of the worker
    {"cli", "ext", "testing"},  # 14 skins
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """The modules of ours that *path* imports, wherever in the file, by the name of their floor."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "sqla_river"
                else [node.module or ""]
            )
        else:
            continue
        for name in names:
            parts = name.split(".")
            assert parts[0] != "sqla_river_alembic", f"{path}: the core never imports Alembic"
            if parts[0] == "sqla_river":
                assert len(parts) > 1, f"{path}: nothing inside imports the package root"
                yield parts[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_floors_only(path: Path) -> None:
    own = _home(path)
    assert own in FLOOR, f"{own} stands on no floor; give it one"
    for other in _imports(path):
        same_room = own == other and path != PACKAGE / f"{own}.py"
        assert same_room or FLOOR[other] < FLOOR[own], (
            f"{own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR.get(other)})"
        )


def test_the_migrations_package_imports_only_the_ddl_of_ours() -> None:
    for path in (ROOT / "alembic_ext").rglob("*.py"):
        assert set(_imports_of_the_core(path)) <= {"ddl"}, path


def _imports_of_the_core(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sqla_river":
            yield from (
                (alias.name for alias in node.names) if node.module == "sqla_river" else (node.module.split(".")[1],)
            )


@pytest.mark.parametrize("name", ["errors", "states", "ddl", "logs", "signals"])
def test_words_and_data_need_the_standard_library_only(name: str) -> None:
    import sys

    for path in [path for path in MODULES if _home(path) == name]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for each in names:
                assert each.split(".")[0] in sys.stdlib_module_names or each.startswith(f"sqla_river.{name}")


def test_no_floor_names_a_module_that_is_gone() -> None:
    there = {_home(path) for path in MODULES} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert set(FLOOR) <= there
