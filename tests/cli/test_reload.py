"""The watch over Python files."""

import os
from pathlib import Path

from sqla_river.cli.reload import Watch


def touch(path: Path, nanoseconds: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, ns=(nanoseconds, nanoseconds))
    return str(path)


def test_a_file_below_the_folder_that_is_changed_made_or_removed_is_told_once(tmp_path: Path) -> None:
    old = touch(tmp_path / "a.py", 1)
    watch = Watch(tmp_path)

    assert watch.changed() is None
    touch(Path(old), 2)
    assert (watch.changed(), watch.changed()) == (old, None)
    new = touch(tmp_path / "package" / "b.py", 1)
    assert (watch.changed(), watch.changed()) == (new, None)
    Path(new).unlink()
    assert (watch.changed(), watch.changed()) == (new, None)


def test_other_files_and_folders_of_others_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path / "env" / "pyvenv.cfg", 1)
    watch = Watch(tmp_path)
    for name in ("notes.txt", ".git/a.py", "node_modules/a.py", "env/lib/a.py", "__pycache__/a.py"):
        touch(tmp_path / name, 1)

    assert watch.changed() is None


def test_a_file_that_was_added_is_watched_wherever_it_is(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere" / "a.py", 1)
    (tmp_path / "here").mkdir()
    watch = Watch(tmp_path / "here")
    watch.add([elsewhere, str(tmp_path / "gone.py")])

    assert watch.changed() is None
    touch(Path(elsewhere), 2)
    assert (watch.changed(), watch.changed()) == (elsewhere, None)
