"""The port of `work --metrics-port`, as a network sees it."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import urlopen

import pytest

from sqla_river.cli.serving import Serving
from sqla_river.health import Health
from tests.making import eventually


def no_metrics(_environ: dict[str, Any], _start: Callable[..., Any]) -> list[bytes]:
    return []


@pytest.fixture
def serving() -> Iterator[Serving]:
    serving = Serving(0, no_metrics, lambda: Health(True, True, ()))
    serving.start()
    yield serving
    serving.stop()


@pytest.mark.parametrize("address", ["127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])])
def test_it_answers_on_every_address(serving: Serving, address: str) -> None:
    with urlopen(f"http://{address}:{serving.port}/healthz", timeout=10) as answer:
        assert answer.read() == b"ok\n"


def test_a_probe_that_breaks_off_leaves_no_trace(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", serving.port)) as probe:
        probe.send(b"GET /he")
        eventually(answering, 10, "it to be heard")
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # so that closing resets
    eventually(lambda: not answering(), 10, "the end of it")

    assert capsys.readouterr().err == ""


def answering() -> bool:
    return any("process_request_thread" in thread.name for thread in threading.enumerate())
