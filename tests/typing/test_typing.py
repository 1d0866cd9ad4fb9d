"""Both checkers, strict, take what they must and refuse what they must; refusals are ignores that have to be needed."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def _check(folder: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed; pip install -e '.[lint]'")
def test_mypy_takes_and_refuses_what_it_must() -> None:
    _check(ROOT, "mypy", "--follow-imports=silent", *(str(HERE / name) for name in ("accepted.py", "refused.py")))


@pytest.mark.skipif(
    not importlib.util.find_spec("pyright"), reason="pyright is not installed; pip install -e '.[lint]'"
)
def test_pyright_takes_and_refuses_what_it_must(tmp_path: Path) -> None:
    """Pyright heeds mypy's ignores too, so it is given the files without them."""
    for name in ("accepted.py", "refused.py"):
        source = re.sub(r"  # type: ignore\[[\w, -]+\]", "", (HERE / name).read_text())
        (tmp_path / name).write_text(f"# pyright: strict, reportUnnecessaryTypeIgnoreComment=true\n{source}")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))

    _check(tmp_path, "pyright", "--pythonpath", sys.executable)
