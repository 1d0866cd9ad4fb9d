"""Programs of Debian's that some tests need: skipped without them, but where CI runs as root, which installs them."""

import os
import shutil
from pathlib import Path

import pytest


def program(name: str) -> str:
    """The path of *name*; skips the test where there is none, and fails where .ci/run must have installed it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(f"{name} is not installed, but .ci/run installs it")
        pytest.skip(f"{name} is not installed; apt-get install it")
    return str(Path(found))
