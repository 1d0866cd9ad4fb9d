"""`Plan`: how one args class travels. Standard library and attrs only."""

from collections.abc import Callable
from typing import Any

import attrs


@attrs.frozen
class Plan:
    """How one args class travels."""

    encode: Callable[[Any], Any]
    """From an instance to a dict that JSON can hold; raises `Mismatch`."""
    decode: Callable[[Any], Any]
    """The inverse; raises `Mismatch`, or RecursionError for JSON that is nested too deep."""
    secrets: frozenset[str]
    """The JSON keys of redacted fields, at any depth."""
    recursive: bool = False
    """Whether the class can hold itself, so that the depth must be checked."""
    open: bool = False
    """Whether some number's type depends on the JSON alone, so that parsing must be exact."""
    raw: bool = False
    """Whether the class reads JSON text itself: ``decode`` takes that in place of a dict."""
    check: Callable[[Any, Any], None] | None = None
    """Raises `Mismatch` where an instance and what came back of it differ; None where ``encode`` sees to that."""
