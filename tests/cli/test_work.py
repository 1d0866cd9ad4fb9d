"""The options of `sqla-river work`, and the completion of words in a shell."""

import math
import shutil
import subprocess

import click
import pytest

from sqla_river.cli.work import parse_queues, parse_size, work
from tests.commands import COMMAND, environment

CONTEXT = click.Context(work)
OPTION = work.params[0]


def test_queues_are_names_and_slots() -> None:
    assert parse_queues(CONTEXT, OPTION, "default=10, emails=50") == {"default": 10, "emails": 50}
    assert parse_queues(CONTEXT, OPTION, None) is None


@pytest.mark.parametrize("value", ["", "default", "a=", "a=ten", "a=1,a=2", "a=0", "a=-1", "a=10001", "a b=1"])
def test_other_queues_are_a_mistake_in_usage(value: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_queues(CONTEXT, OPTION, value)


@pytest.mark.parametrize(
    ("value", "size"),
    [("512M", 512 * 2**20), ("512", 512 * 2**20), ("1.5G", 1.5 * 2**30), ("400000k", 400_000 * 2**10), ("1GiB", 2**30)],
)
def test_sizes_are_bytes(value: str, size: float) -> None:
    assert parse_size(CONTEXT, OPTION, value) == size
    assert parse_size(CONTEXT, OPTION, None) == math.inf


@pytest.mark.parametrize("value", ["", "0", "-1M", "much", "1T", "1 2"])
def test_other_sizes_are_a_mistake_in_usage(value: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_size(CONTEXT, OPTION, value)


def completed(mode: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        COMMAND,
        env=environment({"_SQLA_RIVER_COMPLETE": mode, **env}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_gives_a_script_for_the_shell(shell: str) -> None:
    ended = completed(f"{shell}_source")

    assert ended.returncode == 0, ended.stderr
    assert f"_SQLA_RIVER_COMPLETE={shell}_complete" in ended.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=ended.stdout, text=True, check=True)


def test_completion_knows_the_options() -> None:
    ended = completed("bash_complete", COMP_WORDS="sqla-river work --max", COMP_CWORD="2")

    assert ended.stdout.split() == ["plain,--max-jobs", "plain,--max-rss"]
