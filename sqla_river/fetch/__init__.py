"""Fetch: lock what is available and mark it running, as many as there are free slots; and move what has come due.

One thread per runner, on a connection of its own. It decodes nothing.
"""

from sqla_river.fetch.fetcher import LARGEST_FETCH, Fetcher

__all__ = ["LARGEST_FETCH", "Fetcher"]
