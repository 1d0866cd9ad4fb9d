"""``priver``: what cannot be is told in a line, with exit code 2; what goes wrong in the application is not hidden."""

import subprocess
import sys
from pathlib import Path

import pytest

from sqla_river.ext import priver

LOGGING = """
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys =
[logger_root]
handlers = console
"""


def test_a_missing_pyramid_is_told_with_the_name_of_the_extra() -> None:
    program = "import sys; sys.modules['pyramid'] = None; from sqla_river.ext.priver import main; main(['shop.ini'])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    told = "priver: sqla_river.ext.pyramid needs pyramid; run pip install 'sqla-river[pyramid]'\n"
    assert (ended.returncode, ended.stderr) == (1, told)


def test_a_command_line_that_cannot_be_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["no-such.ini"], ["no-such.ini", "port"], ["no-such:scheme://x"], ["no-such.ini", "--queues", "x"]):
        with pytest.raises(SystemExit) as ended:
            priver.main(words)
        assert ended.value.code == 2
    assert "no-such.ini" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "section", "told"),
    [
        ("garbage\n", "", "File contains no section headers. file: '"),
        ("[app:main]\nx = 1\nx = 2\n", "", "option 'x' in section 'app:main' already exists"),
        ("[app:main]\nuse = call:os:getcwd\nx = %(nowhere)s\n", "", "interpolation key 'nowhere'"),
        ("[app:main]\nuse = call:os:getcwd\n", "#other", "No section 'other'"),
        ("[app:main]\nuse = egg:sqla-river#no-such\n", "", "Entry point 'no-such' not found in egg 'sqla-river'"),
        (LOGGING, "", "sets up logging, and says nothing of 'handler_console'"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_line(
    settings: str, section: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "shop.ini"
    file.write_text(settings)
    with pytest.raises(SystemExit) as ended:
        priver.main([f"{file}{section}"])
    said = capsys.readouterr().err

    assert ended.value.code == 2
    assert said.startswith("priver: ")
    assert said.count("\n") == 1
    assert told in said


def test_errors_of_the_application_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keyless.py").write_text("{}['no such key']")
    (tmp_path / "shop.ini").write_text("[app:main]\nuse = call:keyless:main\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    with pytest.raises(KeyError, match="no such key"):
        priver.main([str(tmp_path / "shop.ini")])
