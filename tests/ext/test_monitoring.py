"""The dashboard and the alert rules ask for what is really exported; and a real Prometheus fires."""

import json
import re
import shutil
import signal
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
import yaml
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_river import JobContext, Runner, enqueue_many
from sqla_river.ext import prometheus
from sqla_river.ext.prometheus import names as exported
from sqla_river.health import JUDGED
from tests.making import Count, eventually
from tests.ports import reserved_port
from tests.programs import program
from tests.working import handling, put, settled

EXAMPLE: Final = Path(__file__).parent.parent.parent / "examples" / "monitoring"
RULES: Final[list[dict[str, Any]]] = yaml.safe_load((EXAMPLE / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD: Final[dict[str, Any]] = json.loads((EXAMPLE / "grafana" / "dashboard.json").read_text())
QUERIES: Final[list[str]] = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
LABELS: Final[dict[str, set[str]]] = {
    **{name: set(labels) for name, (_, labels) in {**exported.COUNTERS, **exported.OF_DATABASE}.items()},
    **{name: set(labels) for name, (_, labels, _) in exported.OF_RUNNER.items()},
    **{
        f"{name}{end}": {*labels, *(["le"] if end == "_bucket" else [])}
        for name, (_, labels, _) in exported.HISTOGRAMS.items()
        for end in ("_bucket", "_sum", "_count")
    },
}
OF_PROMETHEUS: Final = {"instance", "job"}


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bsqla_river_\w+", expression))


@pytest.mark.parametrize("expression", sorted({*QUERIES, *(rule["expr"] for rule in RULES)}))
def test_an_expression_names_metrics_and_labels_that_the_code_exports(expression: str) -> None:
    names = metrics_in(expression)
    grouped = [label.strip() for found in re.findall(r"by \(([^)]*)\)", expression) for label in found.split(",")]

    assert names
    assert names <= set(LABELS)
    for name in names:
        assert set(grouped) <= LABELS[name] | OF_PROMETHEUS
    for name, matched in re.findall(r"\b(sqla_river_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)=~?\"", matched)) <= LABELS[name]


def test_the_stuck_loops_are_those_that_health_judges() -> None:
    """A duty may take its time: /healthz says nothing of it, and neither does the alert."""
    (named,) = re.findall(r'sqla_river_loop_age_seconds\{loop=~"([^"]*)"\}', of_alert("SqlaRiverStuckLoop")["expr"])

    assert set(named.split("|")) == JUDGED


def test_the_dashboard_shows_every_metric_but_those_of_the_probes() -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for query in QUERIES for name in metrics_in(query)}
    known = {*exported.COUNTERS, *exported.HISTOGRAMS, *exported.OF_RUNNER, *exported.OF_DATABASE}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]

    assert known - shown == {
        "sqla_river_jobs_started_total",
        "sqla_river_jobs_interrupted_total",
        "sqla_river_runner_alive",
        "sqla_river_refresh_timestamp_seconds",
    }
    assert len(set(places)) == len(places)
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert all(re.search(rf"by \([^)]*\b{label}\b", target["expr"]) for label in labels)


def test_the_compose_file_mounts_what_is_there_and_names_its_versions() -> None:
    services = yaml.safe_load((EXAMPLE / "compose.yml").read_text())["services"]

    assert set(services) == {"prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for volume in service["volumes"]:
            assert (EXAMPLE / volume.split(":")[0]).is_file()
    for name in ("prometheus.yml", "grafana/datasource.yml", "grafana/dashboards.yml"):
        assert yaml.safe_load((EXAMPLE / name).read_text())


def of_alert(name: str) -> dict[str, Any]:
    return next(rule for rule in RULES if rule["alert"] == name)


def rule_test(alert: str, series: dict[str, str], at: str, labels: dict[str, str] | None) -> dict[str, Any]:
    """A unit test of promtool's: *alert* fires for *labels* at that time; for None it does not."""
    rule = of_alert(alert)
    expected = [] if labels is None else [{"exp_labels": {**rule["labels"], **labels}}]
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"alertname": alert, "eval_time": at, "exp_alerts": expected}],
    }


def test_promtool_takes_the_rules_and_each_fires_when_it_should(tmp_path: Path) -> None:
    promtool = program("promtool")
    shutil.copy(EXAMPLE / "alerts.yml", tmp_path)
    shutil.copy(EXAMPLE / "prometheus.yml", tmp_path)
    depth = 'sqla_river_queue_depth{queue="q",state="available",instance="%s"}'
    job = '{queue="q",kind="k",instance="a"}'
    age = 'sqla_river_oldest_available_age_seconds{queue="q"}'
    loop = 'sqla_river_loop_age_seconds{instance="a",loop="fetch"}'
    ready, usage = "sqla_river_runner_ready", "sqla_river_notification_queue_usage_ratio"
    old = "sqla_river_oldest_transaction_age_seconds"
    failed, started = f"sqla_river_jobs_failed_total{job}", f"sqla_river_jobs_started_total{job}"
    discarded = f"sqla_river_jobs_discarded_total{job}"
    of_queue, of_job, of_loop = {"queue": "q"}, {"queue": "q", "kind": "k"}, {"instance": "a", "loop": "fetch"}
    tests = [
        rule_test("SqlaRiverBacklog", {depth % "a": "10001x10", depth % "b": "NaN " * 10}, "6m", of_queue),
        rule_test("SqlaRiverBacklog", {depth % "a": "10000x10"}, "6m", None),
        rule_test("SqlaRiverBacklog", {depth % "a": "10001x10"}, "4m", None),
        rule_test("SqlaRiverOldestAvailable", {age: "301x10"}, "2m", of_queue),
        rule_test("SqlaRiverOldestAvailable", {age: "299x10"}, "2m", None),
        rule_test("SqlaRiverFailures", {failed: "0+11x20", started: "0+100x20"}, "15m", of_job),
        rule_test("SqlaRiverFailures", {failed: "0+9x20", started: "0+100x20"}, "15m", None),
        rule_test("SqlaRiverDiscarded", {discarded: "0x5 1x10"}, "8m", of_job),
        rule_test("SqlaRiverDiscarded", {discarded: "7x20"}, "8m", None),
        rule_test("SqlaRiverStuckLoop", {loop: "16x5"}, "2m", of_loop),
        rule_test("SqlaRiverStuckLoop", {loop: "6x5"}, "2m", None),
        rule_test("SqlaRiverStuckLoop", {loop.replace("fetch", "duties"): "600x5"}, "2m", None),
        rule_test("SqlaRiverNoRunner", {ready: "0x5"}, "3m", {}),
        rule_test("SqlaRiverNoRunner", {ready: "1x5"}, "3m", None),
        rule_test("SqlaRiverOldTransaction", {old: "400x5"}, "2m", {}),
        rule_test("SqlaRiverOldTransaction", {old: "200x5"}, "2m", None),
        rule_test("SqlaRiverNotifications", {usage: "0.6x5"}, "1m", {}),
        rule_test("SqlaRiverNotifications", {usage: "0.4x5"}, "1m", None),
    ]
    for test in tests:  # promtool compares annotations too
        (expected,) = test["alert_rule_test"]
        for alert in expected["exp_alerts"]:
            alert["exp_annotations"] = _annotations(expected["alertname"], alert["exp_labels"])
    (tmp_path / "tests.yml").write_text(json.dumps({"rule_files": ["alerts.yml"], "tests": tests}))

    for command in ("check rules alerts.yml", "check config prometheus.yml", "test rules tests.yml"):
        said = subprocess.run([promtool, *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
    assert {test["alert_rule_test"][0]["alertname"] for test in tests} == {rule["alert"] for rule in RULES}


VALUES: Final = {
    "SqlaRiverBacklog": "10001",
    "SqlaRiverOldestAvailable": "5m 1s",
    "SqlaRiverStuckLoop": "16s",
    "SqlaRiverOldTransaction": "6m 40s",
}


def _annotations(alert: str, labels: dict[str, str]) -> dict[str, str]:
    """The annotations of *alert*, its templates filled in."""

    def filled(template: str) -> str:
        value = re.sub(r"\{\{ \$value[^}]*\}\}", VALUES.get(alert, ""), template)
        return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], value)

    return {name: filled(template) for name, template in of_alert(alert)["annotations"].items()}


# ---- end to end ----------------------------------------------------------------------


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002 - the name in the standard library


@pytest.fixture
def registry() -> Iterator[tuple[CollectorRegistry, int]]:
    """A registry, and the port on which its metrics are served."""
    registry = CollectorRegistry()
    with make_server("127.0.0.1", 0, prometheus.make_wsgi_app(registry), handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield registry, server.server_port
        server.shutdown()
        thread.join()


class Prometheus:
    """A Prometheus that scrapes one port once a second, with the shipped rules, which fire at once."""

    def __init__(self, folder: Path, scraped: int, port: int) -> None:
        rules = re.sub(r"for: \w+", "for: 0s", (EXAMPLE / "alerts.yml").read_text())
        (folder / "alerts.yml").write_text(rules)
        config = yaml.safe_load((EXAMPLE / "prometheus.yml").read_text())
        # A scrape that takes longer on a busy machine would make an end of all that it found before.
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "200ms"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{scraped}"]
        (folder / "prometheus.yml").write_text(json.dumps(config))
        self.port = port
        options = f"--config.file=prometheus.yml --storage.tsdb.path=data --web.listen-address=127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [program("prometheus"), *options.split()], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def asked(self, what: str, **query: str) -> Any:
        """What the HTTP API says; an empty object while Prometheus starts."""
        assert self.process.poll() is None, "Prometheus has ended"
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it reads its own files first
                return {}
            raise AssertionError(error.read().decode()) from error
        except OSError:
            return {}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def port() -> Iterator[int]:
    """For Prometheus to listen on."""
    with reserved_port() as port:
        yield port


GONE: Final = {"sqla_river_jobs_cancelled_total", "sqla_river_jobs_snoozed_total", "sqla_river_jobs_rescued_total"}
"""What there is none of in this test."""


def _is_answered(query: str, answer: dict[str, Any]) -> bool:
    """Whether there is an answer; what is counted over time may have one sample so far, and none yet."""
    if "result" not in answer:
        return False
    return bool(answer["result"] or metrics_in(query) & GONE or re.search(r"(rate|increase)\(", query))


def test_a_real_prometheus_answers_every_query_and_fires_the_backlog_alert(
    engine: Engine, registry: tuple[CollectorRegistry, int], tmp_path: Path, port: int
) -> None:
    enough = threading.Event()

    def handles(job: JobContext[Count]) -> None:
        if job.args.number == 2:
            enough.wait(120)
        elif job.args.number == 1:
            raise ValueError

    with Session(engine) as session, session.begin():
        enqueue_many(session, (Count(number) for number in range(12_000)))
        session.execute(text("UPDATE river_job SET queue = 'reports'"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))
    watcher = Prometheus(tmp_path, registry[1], port)
    runner = Runner(engine, handling(handles), queues={"default": 2}, stop_timeout=timedelta(seconds=3))
    prometheus.watch(runner, registry[0])
    try:
        with runner:
            for job_id in (*put(engine, 0, 1), *put(engine, 1, max_attempts=1)):
                settled(engine, job_id)
            put(engine, 2)

            def fired() -> dict[tuple[str, str], str]:
                found: list[dict[str, Any]] = watcher.asked("alerts").get("alerts", [])
                firing = [alert for alert in found if alert["state"] == "firing"]
                return {(of["labels"]["alertname"], of["labels"].get("queue", "")): of["value"] for of in firing}

            def settled_down() -> dict[tuple[str, str], str]:
                alerts = fired()  # until the runner is ready, that there is none
                fires = ("SqlaRiverBacklog", "reports") in alerts and ("SqlaRiverNoRunner", "") not in alerts
                return alerts if fires else {}

            alerts = eventually(settled_down, 60.0, "the backlog alert")
            running = {"query": "sqla_river_jobs_in_progress == 1"}
            eventually(lambda: watcher.asked("query", **running).get("result"), 60.0, "the job that runs")
            scraped = set(watcher.asked("label/__name__/values"))
            for query in QUERIES:
                asked = query.replace("$__rate_interval", "1m").replace("$queue", ".*")
                eventually(lambda: _is_answered(query, watcher.asked("query", query=asked)), 60.0, query)  # noqa: B023
            enough.set()
    finally:
        enough.set()
        watcher.stop()

    assert float(alerts["SqlaRiverBacklog", "reports"]) > 10_000
    assert ("SqlaRiverBacklog", "default") not in alerts
    assert not any(name == "SqlaRiverStuckLoop" for name, _ in alerts)
    for query in QUERIES:
        assert metrics_in(query) <= scraped | GONE, query
