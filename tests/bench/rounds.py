"""Rounds of measurements: each peer once in each, so that a slow minute of the machine is everybody's."""

import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Final

import attrs

from tests.bench.catalog import LOOP, OURS, Entry
from tests.bench.environments import python_of
from tests.bench.peers.face import FAREWELL, Asked
from tests.bench.servers import Servers, Unavailable

ROOT: Final = Path(__file__).parent.parent.parent
PATIENCE: Final = 1_800.0

Tell = Callable[[str], None]


@attrs.frozen
class Amounts:
    """How much of each."""

    jobs: int
    singles: int
    pings: int
    repetitions: int


@attrs.define
class Outcome:
    """What was found of one peer."""

    entry: Entry
    jobs: int
    rounds: list[dict[str, float]] = attrs.field(factory=list[dict[str, float]])
    problem: str = ""

    def medians(self) -> dict[str, float]:
        """By figure; without any if the peer could not be measured to the end once."""
        names = {name for each in self.rounds for name in each}
        return {name: median(each[name] for each in self.rounds if name in each) for name in sorted(names)}


class PeerError(Exception):
    """A peer has failed; the text is the last of what it said."""


def measure(
    entries: Sequence[Entry], amounts: Amounts, servers: Servers, cache: Path, tell: Tell
) -> dict[str, Outcome]:
    """Measure all of *entries*, by name. One that fails is not tried again, and keeps nobody else from going on."""
    outcomes = {each.name: Outcome(each, max(int(amounts.jobs * each.share), 10)) for each in entries}
    for number in range(amounts.repetitions):
        for name, outcome in outcomes.items():
            if outcome.problem:
                continue
            tell(f"round {number + 1} of {amounts.repetitions}: {name}")
            try:
                outcome.rounds.append(_round(outcome, amounts, servers, python_of(outcome.entry, cache)))
            except (Unavailable, PeerError, subprocess.TimeoutExpired) as error:
                outcome.problem = str(error)
    for reference in (LOOP, OURS):
        if reference in outcomes:
            _compare(outcomes.values(), reference, outcomes[reference].rounds)
    return outcomes


def _round(outcome: Outcome, amounts: Amounts, servers: Servers, python: str) -> dict[str, float]:
    entry = outcome.entry
    figures: dict[str, float] = {}
    for phases in (("fill", "work"), ("put",)):  # the second begins with empty tables again
        with servers.fresh(entry.server) as url, tempfile.TemporaryDirectory() as folder:
            for phase in phases:
                if phase == "work" and entry.server == "postgres":
                    servers.settle(url)
                singles = max(int(amounts.singles * min(entry.share * 4, 1)), 10)
                asked = Asked(phase, url, entry.variant, outcome.jobs, singles, amounts.pings, folder)
                figures |= _run(python, entry.module, asked)
    return figures


def _run(python: str, module: str, asked: Asked) -> dict[str, float]:
    process = subprocess.Popen(
        [python, "-m", "tests.bench.peers.measure", module],
        env={**asked.environment(), "PYTHONPATH": str(ROOT)},
        cwd=asked.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us; see below
    )
    try:
        said, errors = process.communicate(timeout=PATIENCE)
    except BaseException:
        process.send_signal(signal.SIGINT)  # it ends the workers that it has started, which takes some a while
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=2 * FAREWELL)
        process.kill()
        raise
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        log = Path(asked.folder) / "worker.log"
        worker = log.read_text(errors="replace").strip().splitlines()[-5:] if log.exists() else []
        raise PeerError("\n".join([f"in phase {asked.phase}: {last[0]}", *worker]))
    figures: dict[str, float] = json.loads(said.splitlines()[-1])
    return figures


def _compare(outcomes: Iterable[Outcome], reference: str, rounds: Sequence[Mapping[str, float]]) -> None:
    """Add to each round the ratio of the jobs worked a second to those of *reference* in the same round."""
    for outcome in outcomes:
        for found, base in zip(outcome.rounds, rounds, strict=False):
            found[f"by_{reference}"] = found["work"] / base["work"]
