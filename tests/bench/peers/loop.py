"""The limit: what a loop written by hand makes of the same tables, and nothing else.

No middleware, errors, retries, events, timeouts, cancelling, fence nor rescue: a job that raised would end it.
"""

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Final

import orjson
import psycopg
from sqlalchemy import create_engine, make_url

from sqla_river.schema import create_all
from tests.bench.peers.face import Asked, Marks, Peer

FETCH: Final = 1_000
THREADS: Final = 8

# A row of COPY in binary: the number of its fields, then each as length and bytes. jsonb begins with its version, 1.
HEAD: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
KIND: Final = struct.pack("!hi", 2, 5) + b"bench"
ARGS: Final = struct.Struct("!ib")
TAIL: Final = struct.pack("!h", -1)

PUT: Final = """
    WITH put AS (INSERT INTO river_job (kind, args) VALUES ('bench', %b::jsonb)) SELECT pg_notify('bench', '')
"""
FETCH_JOBS: Final = """
    UPDATE river_job
    SET state = 'running', attempt = attempt + 1, attempted_at = now(), attempted_by = ARRAY['bench']
    WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM river_job WHERE state = 'available' AND queue = 'default' AND scheduled_at <= now()
        ORDER BY priority, scheduled_at, id LIMIT %b FOR UPDATE SKIP LOCKED
    ))
    RETURNING id, args::text
"""
# The cast keeps the planner on the primary key.
COMPLETE: Final = """
    UPDATE river_job SET state = 'completed', finalized_at = now()
    WHERE id = ANY(%b::bigint[]) AND state::text = 'running'
"""
UNFINISHED: Final = "SELECT EXISTS (SELECT FROM river_job WHERE state IN ('available', 'running'))"


class Loop(Peer):
    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._connection = self._connect()

    def prepare(self) -> None:
        engine = create_engine(make_url(self.asked.url).set(drivername="postgresql+psycopg"))
        create_all(engine)
        engine.dispose()

    def fill(self, numbers: Sequence[int]) -> None:
        rows = [HEAD]
        for number in numbers:
            args = orjson.dumps({"num": number, "t": 0})
            rows += [KIND, ARGS.pack(len(args) + 1, 1), args]
        with (
            self._connection.cursor() as cursor,
            cursor.copy("COPY river_job (kind, args) FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.write(b"".join([*rows, TAIL]))

    def put(self, number: int) -> None:
        self._connection.execute(PUT, [orjson.dumps({"num": number, "t": 0}).decode()], prepare=True)

    @contextmanager
    def working(self) -> Generator[Marks]:
        marks, station = Marks(), Stations()
        stations: list[Callable[[], None]] = [
            lambda: station.fetch(self._connect()),
            *[lambda: station.work(marks) for _ in range(THREADS)],
            lambda: station.complete(self._connect()),
        ]
        threads = [threading.Thread(target=each) for each in stations]
        for thread in threads:
            thread.start()
        try:
            yield marks
        finally:
            station.stopping.set()
            for thread in threads:
                thread.join()

    def unfinished(self) -> bool:
        return self._connection.execute(UNFINISHED).fetchone() == (True,)

    def close(self) -> None:
        self._connection.close()

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.asked.url, autocommit=True)


class Stations:
    """A fetcher, threads that work, and a completer, each of which goes on while the others wait."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._fetched: SimpleQueue[tuple[int, str] | None] = SimpleQueue()
        self._done: deque[int] = deque()

    def fetch(self, connection: psycopg.Connection[Any]) -> None:
        with connection, connection.cursor(binary=True) as cursor:
            cursor.execute("LISTEN bench")
            while not self.stopping.is_set():
                jobs = cursor.execute(FETCH_JOBS, [FETCH], prepare=True).fetchall()
                for job in jobs:
                    self._fetched.put(job)
                if not jobs:
                    for _ in connection.notifies(timeout=0.1, stop_after=1):
                        pass
                while self._fetched.qsize() > FETCH // 2 and not self.stopping.is_set():
                    time.sleep(0.0005)
        for _ in range(THREADS):
            self._fetched.put(None)

    def work(self, marks: Marks) -> None:
        while (job := self._fetched.get()) is not None:
            orjson.loads(job[1])
            marks.note()
            self._done.append(job[0])

    def complete(self, connection: psycopg.Connection[Any]) -> None:
        with connection, connection.cursor() as cursor:
            while not self.stopping.is_set():
                ids = [self._done.popleft() for _ in range(len(self._done))]
                if ids:
                    cursor.execute(COMPLETE, [ids], prepare=True)
                else:
                    time.sleep(0.0005)


PEER = Loop
