"""The entry point is harmless to everybody who has it in their environment, and costs next to nothing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.migrations.projects import ROOT, environment, run

# What is imported first decides how far Alembic is when it loads its plugins.
FIRST = [
    "import alembic",
    "import sqla_river_alembic",
    "import alembic.op",
    "import alembic.context",
    "import alembic.config",
    "import alembic.command",
    "import alembic.operations",
    "import alembic.operations.ops",
    "import alembic.autogenerate",
    "import alembic.autogenerate.render",
    "import alembic.runtime.plugins",
    "import alembic.util",
    "import sqla_river",
]
AFTER = """
import alembic.op, alembic.operations, alembic.autogenerate, alembic.runtime.migration
import alembic.runtime.plugins as plugins
assert "sqla_river" in plugins._all_plugins
assert callable(alembic.op.river_upgrade) and callable(alembic.op.river_downgrade)
import sqla_river_alembic
assert list(sqla_river_alembic) == [sqla_river_alembic]
"""


def python(code: str, folder: Path, *options: str, path: str = "") -> str:
    env = environment(folder)
    env["PYTHONPATH"] = path + env["PYTHONPATH"]
    return run(sys.executable, "-W", "error", *options, "-c", code, folder=folder, env=env).stdout


def test_the_entry_point_is_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["entry-points"]["alembic.plugins"] == {"sqla_river": "sqla_river_alembic"}


def test_the_plugin_is_there_whatever_is_imported_first(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys\n"
        f"for first in {FIRST[:4]!r}:\n"
        f"    subprocess.run([sys.executable, '-W', 'error', '-c', first + {AFTER!r}], check=True)\n"
    )
    python(script, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.18.0", "1.18.5", "1.19.2", "1.20.0", "1.20.1"])
def test_the_plugin_is_harmless_on_every_alembic(tmp_path: Path, version: str) -> None:
    library = tmp_path / "alembic"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(library),
        f"alembic=={version}",
    ]
    subprocess.run(install, check=True, capture_output=True)
    assert version in python("import alembic; print(alembic.__version__)", tmp_path, path=f"{library}:")

    for first in FIRST:
        python(first + AFTER, tmp_path, path=f"{library}:")


def test_importing_alembic_imports_nothing_heavy_on_our_account(tmp_path: Path) -> None:
    code = "import sys, alembic, sqla_river_alembic; print(*sorted(sys.modules))"
    loaded = python(code, tmp_path).split()

    ours = {name for name in loaded if name.startswith("sqla_river")}
    assert ours == {"sqla_river_alembic", "sqla_river_alembic._ops"}
    assert not [name for name in loaded if name.split(".")[0] in ("psycopg", "attrs", "attr", "cattrs", "psycopg2")]
    assert "sqlalchemy.orm" not in loaded


COST = """
import time
from importlib import metadata
metadata.entry_points = lambda **_: []
import alembic.op
from alembic.runtime.plugins import Plugin
began = time.process_time()
import sqla_river_alembic
Plugin.setup_plugin_from_module(sqla_river_alembic, "sqla_river")
print(time.process_time() - began)
"""


def test_the_plugin_costs_import_alembic_under_three_milliseconds(tmp_path: Path) -> None:
    costs = [float(python(COST, tmp_path)) for _ in range(6)]  # the first one byte-compiles; others share the machine

    assert min(costs) < 0.003, costs


def test_a_misspelt_plugin_is_an_error(tmp_path: Path) -> None:
    code = (
        "from alembic.runtime.plugins import Plugin\n"
        "from alembic.util import CommandError, PriorityDispatcher\n"
        "try: Plugin.populate_autogenerate_priority_dispatch(PriorityDispatcher(), ['sqla_rivre'])\n"
        "except CommandError as error: print(error)"
    )

    assert "Did not locate plugins: sqla_rivre" in python(code, tmp_path)
