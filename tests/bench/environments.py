"""A virtual environment for each peer, made once."""

import hashlib
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

from tests.bench.catalog import Entry
from tests.bench.servers import Unavailable


def python_of(entry: Entry, cache: Path) -> str:
    """Give the Python in which *entry* runs, after it was installed there if need be.

    Raises:
        Unavailable: a program is not on this machine, or pip could not install a package.
    """
    for program in entry.programs:
        if shutil.which(program) is None:
            raise Unavailable(f"{program} is not here; apt-get install {entry.packages}")
    if not entry.requirements:
        return sys.executable
    asked = "\n".join([sys.version, *entry.requirements])
    folder = cache / f"{entry.module}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():  # its last step: one that was interrupted is made anew
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *entry.requirements]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise Unavailable(f"pip could not install {', '.join(entry.requirements)}: {ended.stderr.strip()[-300:]}")
        done.touch()
    return str(python)


@cache
def versions_in(python: str) -> dict[str, str]:
    """Tell what is installed there, by name."""
    told = "import importlib.metadata as m; print('\\n'.join(f'{d.name} {d.version}' for d in m.distributions()))"
    ended = subprocess.run([python, "-c", told], capture_output=True, text=True, check=True)
    return dict(line.split() for line in sorted(ended.stdout.splitlines()))
