"""The examples of deployment: what can be known of them without systemd and without containers."""

import configparser
import inspect
import json
import shlex
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from sqla_river.cli.app import app
from sqla_river.cli.crew import GRACE
from sqla_river.runner import Runner
from tests.commands import ROOT

DEPLOY: Final = ROOT / "examples" / "deploy"
LONGEST_STOP: Final[timedelta] = inspect.signature(Runner).parameters["stop_timeout"].default + timedelta(seconds=GRACE)


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "sqla-river.service")
    return parser


def containerfile() -> list[tuple[str, str]]:
    """Instruction and rest of each line."""
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def takes(words: list[str]) -> dict[str, Any]:
    """What our command line makes of *words*; it refuses what it does not know."""
    name, *rest = words
    with app.commands[name].make_context(name, rest) as context:
        return context.params


def test_the_unit_stops_one_process_and_waits_longer_than_the_supervisor_does() -> None:
    service = unit()["Service"]

    assert timedelta(seconds=float(service["TimeoutStopSec"])) > LONGEST_STOP
    assert service["KillMode"] == "mixed"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "sqla-river"
    assert takes(words)["processes"] > 1


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "sqla-river.service").read_text()
    copy = tmp_path / "sqla-river.service"
    copy.write_text(text.replace("/srv/shop/.venv/bin/sqla-river", sys.executable).replace("/srv/shop", str(tmp_path)))

    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )

    assert "sqla-river.service" not in ended.stderr
    assert ended.returncode == 0, ended.stderr


def test_the_image_is_made_of_what_is_there_and_takes_signals_itself() -> None:
    lines = containerfile()
    for word, rest in lines:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
    said = dict(lines)
    assert said["USER"] == "app"
    entrypoint, command = json.loads(said["ENTRYPOINT"]), json.loads(said["CMD"])
    assert entrypoint == ["sqla-river"]
    assert takes(command)["app"] == "shop.worker:runner"


def test_the_composition_waits_longer_than_the_supervisor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = services()
    worker = by_name["worker"]

    assert timedelta(seconds=int(worker["stop_grace_period"].removesuffix("s"))) > LONGEST_STOP
    assert worker["init"] is True
    assert takes(worker["command"])["processes"] > 1
    monkeypatch.setenv("DATABASE_URL", by_name["migrate"]["environment"]["DATABASE_URL"])
    assert takes(by_name["migrate"]["command"])["url"].host == "database"
    for service in by_name.values():
        for other in service.get("depends_on", {}):
            assert other in by_name
        if "build" in service:
            assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).exists()
