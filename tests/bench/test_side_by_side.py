"""The command, on few jobs: that it runs to the end, whoever fails."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

COMMAND = [sys.executable, "-m", "tests.bench"]
SHORT = ["--jobs", "300", "--singles", "10", "--pings", "10", "--repetitions", "1", "--markdown"]
ROOT = Path(__file__).parent.parent.parent
FIGURES = {"bulk", "single", "work", "p50", "p95"}


def test_a_run_gives_a_table_json_and_a_plot_and_names_who_is_missing(server: str, tmp_path: Path) -> None:
    nothing_installed = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*COMMAND, "sidekiq", *SHORT, "--database-url", server, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=nothing_installed,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr

    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())["peers"]
    assert set(found) == {"loop", "sqla_river-threads", "sidekiq"}
    for name in ("loop", "sqla_river-threads"):
        assert found[name]["problem"] is None
        assert set(found[name]["medians"]) >= FIGURES
        assert all(value > 0 for figure, value in found[name]["medians"].items() if figure != "cpu")
    assert found["loop"]["medians"]["by_loop"] == found["sqla_river-threads"]["medians"]["by_sqla_river-threads"] == 1
    assert found["sidekiq"]["medians"] == {}
    assert "apt-get install ruby-sidekiq" in ended.stdout
    assert [line.split("|")[1].strip() for line in ended.stdout.splitlines() if line.startswith("|")] == [
        "peer",
        "-" * len("sqla_river-threads") + "--",
        "loop",
        "sqla_river-threads",
        "sidekiq",
    ]
    assert len(ET.parse(tmp_path / "bench.svg").findall(".//{http://www.w3.org/2000/svg}rect")) == 6
