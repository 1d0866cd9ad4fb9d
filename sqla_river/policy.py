"""Retry policies: attempt to delay."""

import math
import random
from datetime import timedelta
from typing import Final, Protocol

import attrs

from sqla_river.errors import InvalidOptionError

LONGEST_RETRY: Final = timedelta(days=30)


class RetryPolicy(Protocol):
    """How long to wait after failed attempt number *attempt* (the first is 1) until the next."""

    def delay(self, attempt: int, /) -> timedelta: ...


def _positive(_: object, field: "attrs.Attribute[timedelta]", value: object) -> None:
    if not isinstance(value, timedelta):
        raise InvalidOptionError(
            field.name, f"{field.name} must be a timedelta, got {value!r}; a bare number means no time"
        )
    if value < timedelta(0):
        raise InvalidOptionError(field.name, f"{field.name} must not be negative, got {value}")


def _factor(_: object, field: "attrs.Attribute[float]", value: object) -> None:
    if not (isinstance(value, int | float) and 1 <= value < math.inf):
        raise InvalidOptionError(field.name, f"{field.name} must be 1 or more, got {value!r}")


def _fraction(_: object, field: "attrs.Attribute[float]", value: object) -> None:
    if not (isinstance(value, int | float) and 0 <= value <= 1):
        raise InvalidOptionError(field.name, f"{field.name} must be 0..1, got {value!r}")


def _bounded(base: float, exponent: float, factor: float, longest: timedelta, jitter: float) -> timedelta:
    """``base * factor ** exponent`` seconds +-*jitter*, at most *longest*; by logarithms, so that nothing overflows."""
    cap = longest.total_seconds()
    if base <= 0:
        return timedelta(0)
    size = math.log(base) + exponent * math.log(factor) if factor > 0 else -math.inf
    seconds = cap if size >= math.log(max(cap, 1e-6)) else math.exp(size)
    seconds *= 1 + random.uniform(-jitter, jitter)  # noqa: S311 - not a secret
    return longest if seconds >= cap else timedelta(seconds=seconds)


@attrs.frozen
class Exponential:
    """``base * factor ** (attempt - 1)``, at most *max*, spread by +-*jitter* (a fraction, 0.1 is 10 %).

    Example:
        ``Exponential(base=timedelta(minutes=1), factor=2)`` waits 1, 2, 4 ... minutes.

    Raises:
        InvalidOptionError: negative durations, a factor below 1, a jitter outside 0..1.
    """

    base: timedelta = attrs.field(validator=_positive)
    factor: float = attrs.field(default=2.0, validator=_factor)
    max: timedelta = attrs.field(default=LONGEST_RETRY, validator=_positive)
    jitter: float = attrs.field(default=0.0, validator=_fraction)

    def delay(self, attempt: int, /) -> timedelta:
        return _bounded(self.base.total_seconds(), max(attempt, 1) - 1, self.factor, self.max, self.jitter)


class RiverPolicy:
    """River's default: ``attempt ** 4`` seconds, spread by +-10 %; here capped at 30 days, in River after centuries."""

    def delay(self, attempt: int, /) -> timedelta:
        return _bounded(1, 4, max(attempt, 1), LONGEST_RETRY, 0.1)


RIVER_POLICY: Final = RiverPolicy()
