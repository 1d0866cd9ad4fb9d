"""Ports for servers that have to be told a number."""

import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def reserved_port(host: str = "127.0.0.1") -> Generator[int]:
    """A port that the system gives to nobody else within the block.

    Linux lets a server with SO_REUSEADDR listen on a port that is bound here and not listened on. Elsewhere it is free
    again at once.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, 0))
        port = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port
