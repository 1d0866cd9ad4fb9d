"""Signals that are taken, and what a forked child has of them."""

import subprocess
import sys
from typing import Final

PROGRAM: Final = """
import os, signal
from sqla_river.signals import take, taken

def outer(*_): ...
def inner(*_): ...
def childs(*_): ...

def stands():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)], signal.pthread_sigmask(0, ())

def forked(look):
    child = os.fork()
    if child == 0:
        look()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

def as_before():
    assert stands() == before, stands()

def sets_its_own():
    signal.signal(signal.SIGTERM, childs)
    mine = stands()
    forked(lambda: (stands() == mine or os._exit(1)))

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
before = stands()
with taken((signal.SIGTERM, signal.SIGHUP), outer):
    with taken((signal.SIGTERM,), inner):
        ours = stands()
        assert ours[0] == [inner, outer]
        forked(as_before)
        forked(sets_its_own)
        assert stands() == ours
as_before()
try:
    with taken((signal.SIGTERM,), outer):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, childs)
        raise KeyError
except KeyError:
    if child == 0:
        os._exit(signal.getsignal(signal.SIGTERM) is not childs)
assert os.waitpid(child, 0)[1] == 0
as_before()
take((signal.SIGTERM,), outer)
forked(as_before)
print("ok")
"""


def test_a_forked_child_has_the_handlers_from_before_and_keeps_those_that_it_sets() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=False)

    assert (ended.stdout, ended.stderr, ended.returncode) == ("ok\n", "", 0)
