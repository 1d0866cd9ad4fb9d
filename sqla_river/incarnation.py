"""One life of a Runner: its stations put together, from start to stop."""

import atexit
import json
import os
import re
import secrets
import socket
import time
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import repeat
from operator import attrgetter, itemgetter
from typing import Any, Final, cast

from sqla_river import store
from sqla_river.check import require_schema
from sqla_river.complete import Completer
from sqla_river.counters import Counters
from sqla_river.duties.count import Count
from sqla_river.duties.figures import LookAround
from sqla_river.duties.prune import Clean, Prune
from sqla_river.duties.reindex import Reindex
from sqla_river.duties.rescue import Isolate, Rescue
from sqla_river.duties.trouble import Strangers, Trouble
from sqla_river.duties.turns import STATEMENT_TIMEOUT, Turns
from sqla_river.errors import SchemaError
from sqla_river.execute import Executor
from sqla_river.fetch import Fetcher
from sqla_river.heartbeat import Fleet, Heartbeat
from sqla_river.held import Held
from sqla_river.hooks import Audience, Event
from sqla_river.judge import Judge
from sqla_river.listen import Listener
from sqla_river.logs import Log
from sqla_river.loop import Loop
from sqla_river.models import declared_schema
from sqla_river.orders import Orders
from sqla_river.rows import ID, QUEUE, Fetched, Result, row_of
from sqla_river.settle import Scope, parted
from sqla_river.states import FINALIZED, JobState
from sqla_river.stopping import FLUSH_TIMEOUT, Stop
from sqla_river.store import OwnConnection
from sqla_river.wait import finished_here
from sqla_river.watch import Watch

log: Final = Log(__name__)

CONTROL: Final = "river_control"
TOPICS: Final = ("river_insert", CONTROL)
_id_of, _queue_of, _queue_of_job = itemgetter(ID), itemgetter(QUEUE), attrgetter("job.queue")
DUTIES_AFTER: Final = 1.0
"""Seconds from the first fetch to the first look at the duties: what waits for the start of a runner comes first, while
connections, plans and threads are made.
"""
SAME_PLAN: Final = {"plan_cache_mode": "force_generic_plan"}
"""To plan anew costs a tenth of a fetch of a hundred rows."""
BY_ID: Final = dict.fromkeys(("enable_nestloop", "enable_mergejoin", "enable_bitmapscan"), "off")
"""A plan that was made while the table was empty must not walk all of it, until the next ANALYZE."""
READY_TIMEOUT: Final = 10.0
"""Seconds that `Runner.start` waits for LISTEN; after that the poll does, and LISTEN goes on trying."""


def new_runner_id() -> str:
    """host, pid and a nonce: ``<host>:<pid>:<16 hex>``. New for each incarnation: no token is ever used twice."""
    host = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:60] or "host"
    return f"{host}:{os.getpid()}:{secrets.token_hex(8)}"


class Incarnation:
    """One life of a Runner, from start to stop: its stations, their threads, and an id of its own."""

    def __init__(self, orders: Orders) -> None:
        self.id = new_runner_id()
        self.pid = os.getpid()
        self.started = self.stopping = False
        self._at_exit = partial(_stop_at_exit, weakref.ref(self))  # its own: others in this process go on
        self.events, self._meters = orders.events, orders.meters
        self.worked = 0
        self._checked = False
        self._refused: SchemaError | None = None
        schema = declared_schema(orders.river.job_class)
        slots = orders.queues.now
        engine = store.twin(orders.engine)

        def own(role: str, settings: Mapping[str, str], *, binary: bool = False) -> OwnConnection:
            given = {"enable_seqscan": "off", **settings}
            return OwnConnection(engine, schema, f"sqla_river:{role}:{self.id}", given, binary=binary)

        fetch, heartbeat = own("fetch", SAME_PLAN, binary=True), own("heartbeat", {})
        complete, duties = own("complete", SAME_PLAN | BY_ID), own("duties", {"statement_timeout": STATEMENT_TIMEOUT})
        self._watch = Watch(lambda: self._watching.wake(), lambda job: self._held.stuck(job), lambda: self._held.look())
        self.executor = Executor(
            orders.workers,
            orders.river.settings.codec,
            Judge(orders.workers, retry=orders.retry, on_error=orders.on_error, log_args=orders.log_args),
            timeout=orders.timeout,
            watch=self._watch.add,
            scope=Scope(
                orders.engine, orders.river.job_class, orders.sessions, orders.async_engine, lambda: self.stopping
            ),
            progressed=lambda job: self.completer.progressed(job),
            middleware=orders.middleware,
            around=orders.around,
            keep_logs=orders.keep_logs,
            audience=Audience(orders.events, orders.meters),
        )
        self.completer: Completer = Completer(
            complete,
            wake=lambda: self._completing.wake(),
            completed=self._completed,
            written=self._written,
            relieved=lambda: self._fetcher.relieved(),
        )
        self._listener = (
            Listener(
                store.twin(orders.listen_engine), schema, f"sqla_river:listen:{self.id}", TOPICS, self._heard, self.id
            )
            if orders.listen_engine is not None
            else None
        )
        self._fetcher = Fetcher(
            fetch,
            self.id,
            slots,
            kinds=lambda: orders.workers.kinds,
            deliver=self._fetched,
            give_back=lambda queue: self._held.give_back_ahead(queue),
            written=lambda: not self.completer.backlog,
            ready=lambda: self.completer.ready and self._heart.fresh and not self._held.exhausted,
            poll=orders.poll,
            hears=lambda: self._listener is not None and self._listener.hears,
            wake=lambda: self._fetching.wake(),
        )
        self._held: Held = Held(
            self.executor,
            self.completer,
            slots,
            freed=self._fetcher.freed,
            returned=self._fetcher.returned,
            recovered=self._fetcher.relieved,
            runner=self.id,
            last=partial(parted, orders.async_engine) if orders.async_engine is not None else None,
        )
        self._counters = Counters(self.id)
        self._own_heart, self._own_complete, self._schema = heartbeat, complete, schema
        self._heart = Heartbeat(
            heartbeat,
            self.id,
            slots,
            orders.heartbeat,
            orders.lease,
            free=lambda: self._fetcher.free_queues(),
            unfinished=lambda: self._held.rows,
            lost=self._held.lost,
            unknown=lambda running: self._held.unknown(running, self._fetcher.unsure),
            rescued=self._rescued,
            learnt=self._learnt,
            beat=lambda now: self._counters.write(heartbeat, now, 0.0),
        )
        self.turns = Turns(
            duties,
            [
                Rescue(lambda: self._heart.kept, self._rescued, _sweep_every(orders.lease)),
                Isolate(lambda: self._fetcher.suspects, self._fetcher.turn.begin, lambda: self._fetcher.turn.longest),
                Prune(orders.retention),
                Count(),
                Clean(),
                Trouble(lambda: self._fetcher.due.rank == 0),
                Strangers(lambda: list(self._heart.slots), lambda: orders.workers.kinds),
                LookAround(self._meters),
                *([Reindex()] if orders.reindex else []),
            ],
        )
        loop = partial(Loop, runner=self.id)
        self._fetching = loop("sqla_river-fetch", self._fetcher.step, fetch.close)
        self._completing = loop("sqla_river-complete", self.completer.step, self._flush)
        self._beating = loop("sqla_river-heartbeat", self._beat, self._heart.leave, longest=min(5.0, orders.heartbeat))
        self._maintaining = loop("sqla_river-duties", self._maintain, duties.close)
        self._watching: Loop = loop("sqla_river-watch", lambda: self._watch.step(self.executor.running))
        self._stop = Stop(self._held, self.executor, self.completer, self._fetching, self._completing, self.id)

    # ---- the arrows between the stations ------------------------------------------------------------

    def _fetched(self, rows: list[Fetched]) -> None:
        if rows and not self.stopping and self._meters.attached:
            self._meters.tell("fetched", list(map(row_of, rows)))
        self._held.deliver(rows)

    def _completed(self, rows: Sequence[Fetched]) -> None:
        self._counters.add(zip(map(_queue_of, rows), repeat(JobState.COMPLETED)))
        self.worked += len(rows)
        finished_here(map(_id_of, rows))

    def _written(self, results: Sequence[Result], states: Sequence[JobState]) -> None:
        self._counters.add(zip(map(_queue_of_job, results), states, strict=True))
        self.worked += len(results)
        if states.count(JobState.COMPLETED) < len(states):
            for result, state in zip(results, states, strict=True):
                delay = result.transition.delay
                if delay is not None and state in (JobState.RETRYABLE, JobState.SCHEDULED):
                    self._fetcher.due.due_in(delay.total_seconds())
        finished_here(result.job.id for result, state in zip(results, states, strict=True) if state in FINALIZED)
        if self._meters.attached:
            self._meters.tell("written", list(zip(results, states, strict=True)))
        if self.events.heard:
            self.events.results(zip(results, states, strict=True))

    def _rescued(self, freed: Sequence[Any]) -> None:
        # Before the fetch that it is woken for.
        self._fetcher.deaths = self._fetcher.deaths or bool(freed)
        if any(row.suspect for row in freed):
            self._fetcher.suspects = True
        self._fetcher.heard(None)
        # Those of Go's clients are counted with all else that no runner of ours ends.
        self._counters.add((row.queue, JobState(row.state)) for row in freed if row.ours)
        self._meters.tell("rescued", freed)
        if self.events.heard:
            for row in freed:
                self.events.put(Event("rescued", row.queue, row.id, row.kind))

    def _heard(self, topic: str | None, payload: str, pid: int) -> None:
        """A notification of the backend *pid*: anybody may send one, so it is only a hint."""
        if topic is None:  # LISTEN is in force, perhaps again: a queue may have been resumed meanwhile
            self._fetcher.resumed(None)
            return
        notice = _notice(payload)
        queue = notice.get("queue")
        queue = queue if isinstance(queue, str) else None
        if topic == CONTROL:
            self._controlled(notice.get("action"), queue, notice.get("job_id"))
            return
        if notice.get("suspects") is True:
            self._fetcher.suspects = self._fetcher.deaths = True
        elif notice.get("deaths") is True:
            self._fetcher.deaths = True
        self._fetcher.heard(queue, pid)

    def _controlled(self, action: object, queue: str | None, job_id: object) -> None:
        if action == "cancel" and isinstance(job_id, int) and job_id in self._held:
            self._beating.wake()  # which reads whether somebody did ask
        elif action == "resume":
            self._fetcher.resumed(None if queue in (None, "*") else queue)
        elif action == "pause":
            self._held.give_back_ahead(None if queue == "*" else queue)
        if (
            action in ("pause", "resume")
            and self.events.heard
            and queue is not None
            and (queue == "*" or queue in self._heart.slots)
        ):
            self.events.put(Event("queue_paused" if action == "pause" else "queue_resumed", queue))

    def _learnt(self, fleet: Fleet) -> None:
        self._fetcher.due.rank = fleet.rank
        self._fetcher.wakeups.place, self._fetcher.wakeups.peers = fleet.place, fleet.peers
        self._fetcher.suspects, self._fetcher.deaths = fleet.suspects, fleet.deaths
        self._fetcher.relieved()
        self._held.cancel(fleet.cancelled)

    def _flush(self) -> None:
        self.completer.flush(lambda: self._stop.flush_by)
        try:
            if self._heart.clock is not None:
                self._counters.write(self._own_complete, self._heart.clock, FLUSH_TIMEOUT)
        finally:
            self.completer.close()

    # ---- life ------------------------------------------------------------

    def start(self) -> None:
        """Begin this life; where that fails it has to be stopped too."""
        atexit.register(self._at_exit)
        self._meters.tell("started", self.id)
        for loop in (self._completing, self._beating, self._maintaining, self._watching):
            loop.start()
        if self._listener is not None:
            self._listener.start()
        self.executor.prepare()
        until = time.monotonic() + READY_TIMEOUT
        while not (self._ready() or self._refused or self._stop.wanted) and time.monotonic() < until:
            time.sleep(0.005)
        if self._refused is not None:
            raise self._refused
        self._fetching.start()
        self.started = True
        log.info("runner %s works queues %s", self.id, _listed(self._heart.slots), runner=self.id)

    def _beat(self) -> float:
        """A heartbeat; before the first, whether the tables are there and as this library needs them."""
        if not self._checked:
            try:
                require_schema(self._own_heart.get(), self._schema)
            except SchemaError as error:
                if self._refused is None:
                    log.error("runner %s cannot work: %s", self.id, error)  # noqa: TRY400 - it says all there is to say
                self._refused = error
                return 1.0
            self._checked = True
            self._refused = None
        return self._heart.step()

    def _maintain(self) -> float:
        """The duties, `DUTIES_AFTER` the first fetch; never before this runner stands in the table."""
        if not (self.started and self._heart.beaten):
            return 0.1
        left = self._fetching.began + DUTIES_AFTER - time.monotonic()
        return left if left > 0 else self.turns.step()

    def loops(self) -> dict[str, tuple[float, float]]:
        """When each inner loop last showed that it does not hang, and when it last did well (monotonic); without those
        that a stop has ended.
        """
        found: dict[str, Loop | Listener | None] = {
            "fetch": self._fetching if self.started else None,
            "complete": self._completing,
            "heartbeat": self._beating,
            "listen": self._listener,
            "duties": self._maintaining,
            "watch": self._watching,
        }
        return {
            name: (loop.turned, loop.moved)
            for name, loop in found.items()
            if loop is not None and (loop.alive or not self.stopping)
        }

    def _ready(self) -> bool:
        """Who owns what is fetched must stand in the table before the first fetch, and LISTEN before anybody relies on
        it.
        """
        return self._heart.beaten and (self._listener is None or self._listener.ready.is_set())

    def resize(self, slots: Mapping[str, int]) -> None:
        """Work *slots* from now on. Returns once new queues have their rows, or after 10 s without a database."""
        if slots is self._heart.slots:
            return
        log.info("runner %s works queues %s from now on", self.id, _listed(slots))
        self._held.resize(slots)
        self._fetcher.resize(slots)
        self._heart.slots = slots
        self._beating.wake()
        until = time.monotonic() + READY_TIMEOUT
        while not (self._heart.touched >= slots.keys() or self.stopping) and time.monotonic() < until:
            if not self._beating.alive:  # a child that was forked
                return
            time.sleep(0.002)

    @property
    def exhausted(self) -> bool:
        """Whether so many handlers hang that nothing is fetched: a process that does nothing else should end."""
        return self._held.exhausted

    def hurry(self) -> None:
        """See `Stop.hurry`."""
        self._stop.hurry()

    def ask(self, step: int) -> None:
        """See `Stop.ask`."""
        self._stop.ask(step)

    def stop(self, soft: float) -> None:
        """End this life: *soft* seconds for what runs, and then `Stop`'s further steps."""
        self.stopping = self._held.stopping = True
        self._stop.run(soft)
        for loop in (self._maintaining, self._beating, self._watching):
            loop.stop()
        if self._listener is not None and self._listener.alive:
            self._listener.stop()
            self._listener.join(0.1)
        self._beating.join(0.1)
        self._held.join(0.1)
        atexit.unregister(self._at_exit)
        log.info("runner %s has stopped", self.id, runner=self.id)


def _stop_at_exit(reference: "weakref.ref[Incarnation]") -> None:
    incarnation = reference()
    if incarnation is not None and incarnation.pid == os.getpid():
        incarnation.stop(0.0)


def _listed(slots: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in slots.items())


def _notice(payload: str) -> dict[str, Any]:
    """What a notification says; nothing where it makes no sense: anybody may send one, and it is only a hint."""
    try:
        notice = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", notice) if isinstance(notice, dict) else {}


def _sweep_every(lease: float) -> timedelta:
    """5 s, or sooner where leases are shorter than the usual 30 s."""
    return timedelta(seconds=min(5.0, lease / 6))
