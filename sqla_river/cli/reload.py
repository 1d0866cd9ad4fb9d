"""`--reload`: notices that a Python file has changed.

By looking at the files, which works on every file system, those that containers mount included.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

PASSED_OVER: Final = {"__pycache__", "node_modules", "site-packages"}


class Watch:
    """Of the Python files below *folder*, but for hidden folders and virtual environments, and of files added later."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._added: set[str] = set()
        self._seen = self._look()

    def add(self, files: Iterable[str]) -> None:
        """Watch these too, from now on."""
        for file in files:
            if file not in self._seen:
                self._added.add(file)
                self._seen |= _times([file])

    def changed(self) -> str | None:
        """A file that was changed, made or removed since the last look, if any."""
        before, self._seen = self._seen, self._look()
        different = before.items() ^ self._seen.items()
        return min((file for file, _ in different), default=None)

    def _look(self) -> dict[str, int]:
        files = set(self._added)
        for folder, folders, names in os.walk(self._folder):
            if "pyvenv.cfg" in names:
                folders.clear()
                continue
            folders[:] = [name for name in folders if name[0] != "." and name not in PASSED_OVER]
            files.update(str(Path(folder, name)) for name in names if name.endswith(".py"))
        return _times(files)


def _times(files: Iterable[str]) -> dict[str, int]:
    times: dict[str, int] = {}
    for file in files:
        try:
            times[file] = Path(file).stat().st_mtime_ns
        except OSError:  # removed
            continue
    return times
