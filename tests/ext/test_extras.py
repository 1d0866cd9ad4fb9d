"""What needs an extra says which, where that is missing."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "missing", "name", "extra"),
    [
        ("asgi", "anyio", "anyio", "asgi"),
        ("flask", "flask", "Flask", "flask"),
        ("opentelemetry", "opentelemetry", "OpenTelemetry", "otel"),
        ("prometheus", "prometheus_client", "prometheus_client", "prometheus"),
    ],
)
def test_a_missing_package_is_told_with_the_name_of_its_extra(module: str, missing: str, name: str, extra: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import sqla_river.ext.{module}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    told = f"sqla_river.ext.{module} needs {name}; run pip install 'sqla-river[{extra}]'"
    assert ended.stderr.splitlines()[-1].partition(": ")[2] == told
