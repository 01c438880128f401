"""One queue before all replicas: who gets a place and when, what becomes of those whose replica dies, and the counts.

Everything here runs in one event loop; replicas deliver their messages from threads, through it. A stream is one answer
on its way: it waits, runs in a slot of one replica, and ends once, with a reason or an error. What a client has not yet
taken is kept as token ids, at most `max_tokens` of them.

Counters and histograms of the server, and Prometheus' text format of them.
"""

import asyncio
import bisect
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Iterable, Sequence

from nanochat.serve.schema import ApiError, Sampling
from nanochat.serve.worker import Connect, Info, Message, WorkerHandle

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # a histogram's bounds


@dataclasses.dataclass
class Histogram:
    """Observations in seconds: how many in each of `SECONDS`' intervals (the last is open), and their sum."""

    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0


@dataclasses.dataclass
class Counters:
    """What has been counted: (name, label) -> number, and name -> histogram."""

    numbers: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    histograms: dict[str, Histogram] = dataclasses.field(default_factory=dict)

    def add(self, name: str, label: str = "", number: int = 1) -> None:
        """Count up."""
        self.numbers[name, label] = self.numbers.get((name, label), 0) + number

    def observe(self, name: str, seconds: float) -> None:
        """Add an observation to a histogram."""
        histogram = self.histograms.setdefault(name, Histogram())
        histogram.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        histogram.total += seconds

    def mean(self, name: str) -> float:
        """Return the mean of a histogram, 0 of an empty one."""
        histogram = self.histograms.get(name, Histogram())
        return histogram.total / max(1, sum(histogram.counts))

    def labelled(self, name: str) -> dict[str, int]:
        """Return {label: number} of a counter."""
        return {label: number for (counter, label), number in self.numbers.items() if counter == name}


def metric(name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    """Return the lines of one metric.

    Args:
        kind: counter or gauge. samples: (labels as Prometheus writes them, or an empty string; value).
    """
    name = f"nanochat_{name}"
    return [
        f"# HELP {name} {about}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value}" for labels, value in samples),
    ]


def histogram(name: str, about: str, counters: Counters) -> list[str]:
    """Return the lines of a histogram; one that nothing was observed in has only zeros."""
    found = counters.histograms.get(name, Histogram())
    name, total = f"nanochat_{name}", 0
    lines = [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
    for bound, count in zip((*map(str, SECONDS), "+Inf"), found.counts):
        total += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"{name}_sum {found.total}", f"{name}_count {total}"]


RESTART_SECONDS = (1.0, 60.0)  # the first pause before a restart, and the longest; each is twice the one before
HANG_SECONDS = 120.0  # without a word while it has answers to give, after which a replica is taken for hung
SOUND_SECONDS = 60.0  # that a replica has been ready for its next failure to count as the first one

log = logging.getLogger("nanochat.serve.app")


@dataclasses.dataclass
class Stream:
    """An answer on its way.

    Attributes:
        key: of the request. prompt: token ids. sampling: with its seed.
        wake: set whenever something has come.
        worker: index of the replica that has it; None: it waits, or has ended waiting.
        tokens: come and not yet taken. count: of all that have come.
        finish: "stop" or "length" when it has ended well. error: why, when it has not.
        arrived, first: clock's seconds of its arrival and of its first token.
    """

    key: int
    prompt: list[int]
    sampling: Sampling
    wake: asyncio.Event
    worker: int | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    count: int = 0
    finish: str | None = None
    error: str | None = None
    arrived: float = dataclasses.field(default_factory=time.perf_counter)
    first: float | None = None

    @property
    def ended(self) -> bool:
        """True when nothing more will come."""
        return self.finish is not None or self.error is not None


@dataclasses.dataclass
class Worker:
    """A replica and what it is doing; `error` is why it ended last, `heard` when its last word came or was due."""

    connect: Connect
    link: WorkerHandle | None = None
    info: Info | None = None
    streams: dict[int, Stream] = dataclasses.field(default_factory=dict)
    restarts: int = 0
    error: str | None = None
    heard: float = 0.0

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.info.slots - len(self.streams) if self.info else 0


@dataclasses.dataclass
class Scheduler:
    """The replicas and the queue before them.

    Attributes:
        info: of the model, once a replica is or was ready. hopeless: why no replica can be ready, ever.
        counters: what /metrics shows. tasks: one a replica, which keeps it running.
    """

    workers: list[Worker]
    queue_limit: int
    counters: Counters
    info: Info | None = None
    hopeless: str | None = None
    closing: bool = False
    queue: dict[int, Stream] = dataclasses.field(default_factory=dict)
    keys: itertools.count = dataclasses.field(default_factory=itertools.count)
    tasks: list[asyncio.Task] = dataclasses.field(default_factory=list)

    @property
    def ready(self) -> bool:
        """True when some replica can answer."""
        return any(worker.info for worker in self.workers)

    @property
    def active(self) -> int:
        """Number of answers that are being made."""
        return sum(len(worker.streams) for worker in self.workers)


def create(connects: Sequence[Connect], queue_limit: int) -> Scheduler:
    """Return a pool of replicas that are yet to be started."""
    return Scheduler([Worker(connect) for connect in connects], queue_limit, Counters())


def open(pool: Scheduler) -> None:
    """Start the replicas, in the running event loop; they are ready later."""
    pool.tasks = [asyncio.create_task(_supervise(pool, index)) for index in range(len(pool.workers))]


async def close(pool: Scheduler) -> None:
    """End all streams and replicas."""
    end_streams(pool, "the server is shutting down")
    for task in pool.tasks:
        task.cancel()
    await asyncio.gather(*pool.tasks, return_exceptions=True)


def end_streams(pool: Scheduler, reason: str) -> None:
    """End what waits and runs, and take nothing more: a shutdown."""
    pool.closing = True
    for stream in [*pool.queue.values(), *(s for worker in pool.workers for s in worker.streams.values())]:
        cancel(pool, stream, reason)


# Streams


def submit(pool: Scheduler, prompt: list[int], samplings: Sequence[Sampling], wake: asyncio.Event) -> list[Stream]:
    """Queue one stream for each of `samplings`, all of them or none.

    Raises:
        ApiError: 503; the queue is full, or the server is ending.
    """
    if pool.closing:
        raise _unavailable("the server is shutting down", 5)
    waiting = max(0, len(pool.queue) + len(samplings) - sum(worker.free for worker in pool.workers))
    if waiting > pool.queue_limit:
        raise _unavailable(f"{len(pool.queue)} requests wait already: try again later", retry_seconds(pool))
    streams = [Stream(next(pool.keys), prompt, sampling, wake) for sampling in samplings]
    pool.queue.update((stream.key, stream) for stream in streams)
    _dispatch(pool)
    return streams


def cancel(pool: Scheduler, stream: Stream, reason: str = "cancelled") -> None:
    """End a stream, if it has not ended, and give its place to the next."""
    if stream.ended:
        return
    stream.error = reason
    pool.counters.add("answers", "cancelled")
    if stream.worker is not None:
        worker = pool.workers[stream.worker]
        del worker.streams[stream.key]
        if worker.link:
            worker.link.send(("cancel", stream.key))
    pool.queue.pop(stream.key, None)
    stream.wake.set()
    _dispatch(pool)


def take(stream: Stream) -> list[int]:
    """Return the tokens that have come since the last call."""
    tokens, stream.tokens = stream.tokens, []
    return tokens


def retry_seconds(pool: Scheduler) -> int:
    """Return in how many seconds a place in the queue may be free: a guess from the answers so far."""
    slots = sum(worker.info.slots for worker in pool.workers if worker.info)
    mean = pool.counters.mean("answer_seconds")
    return max(1, min(60, round(mean * len(pool.queue) / slots))) if slots else 5


def _dispatch(pool: Scheduler) -> None:
    while pool.queue and not pool.closing:
        index = max(range(len(pool.workers)), key=lambda i: pool.workers[i].free)
        worker = pool.workers[index]
        if worker.free <= 0 or worker.link is None:
            return
        stream = pool.queue.pop(next(iter(pool.queue)))
        stream.worker = index
        worker.heard = worker.heard if worker.streams else time.monotonic()
        worker.streams[stream.key] = stream
        worker.link.send(("new", stream.key, stream.prompt, stream.sampling))


def _unavailable(message: str, seconds: int) -> ApiError:
    return ApiError(503, message, kind="overloaded_error", headers={"Retry-After": str(seconds)})


# Replicas


async def _supervise(pool: Scheduler, index: int) -> None:
    """Start a replica, and again whenever it has ended, until cancelled."""
    loop, worker, pause = asyncio.get_running_loop(), pool.workers[index], RESTART_SECONDS[0]
    while True:
        inbox: asyncio.Queue[Message] = asyncio.Queue()

        def deliver(message: Message, inbox: asyncio.Queue[Message] = inbox) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all interest
                loop.call_soon_threadsafe(inbox.put_nowait, message)

        link = worker.connect(deliver)
        worker.link, hopeless, ready_at = link, False, time.monotonic()
        try:
            while (message := await _next(worker, inbox))[0] != "gone":
                if message[0] == "ready":
                    ready_at = time.monotonic()
                elif message[0] == "failed":
                    hopeless = message[2]
                _handle(pool, index, message)
        finally:
            _drop_worker(pool, index)
            await asyncio.shield(loop.run_in_executor(None, link.close))
        if hopeless and pool.info is None:
            pool.hopeless = worker.error
            return
        was_sound = time.monotonic() - ready_at > SOUND_SECONDS
        pause = RESTART_SECONDS[0] if was_sound else pause
        log.error("replica %d has ended (%s); it is started again in %g s", index, worker.error, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, RESTART_SECONDS[1])
        worker.restarts += 1


async def _next(worker: Worker, inbox: asyncio.Queue[Message]) -> Message:
    """Return a replica's next message; of one that hangs, that it has gone: its process is ended then."""
    while True:
        try:
            async with asyncio.timeout(HANG_SECONDS):
                return await inbox.get()
        except TimeoutError:
            if worker.streams and time.monotonic() - worker.heard >= HANG_SECONDS:
                worker.error = f"it hung: for {HANG_SECONDS:g} s it said nothing"
                return ("gone",)


def _handle(pool: Scheduler, index: int, message: Message) -> None:
    worker = pool.workers[index]
    worker.heard = time.monotonic()
    if message[0] == "tokens":
        for key, token, finish in message[1]:
            if stream := worker.streams.get(key):  # a cancel and a token may cross
                _add(pool, worker, stream, token, finish)
        _dispatch(pool)
    elif message[0] == "ready":
        worker.info, worker.error, pool.info = message[1], None, message[1]
        _dispatch(pool)
    elif message[0] == "refused":
        if stream := worker.streams.pop(message[1], None):
            _fail(pool, stream, message[2])
            _dispatch(pool)
    elif message[0] == "failed":
        worker.error = message[1]


def _add(pool: Scheduler, worker: Worker, stream: Stream, token: int, finish: str | None) -> None:
    now = time.perf_counter()
    if stream.first is None:
        stream.first = now
        pool.counters.observe("first_token_seconds", now - stream.arrived)
    stream.tokens.append(token)
    stream.count += 1
    pool.counters.add("tokens")
    if finish:
        stream.finish = finish
        del worker.streams[stream.key]
        pool.counters.add("answers", finish)
        pool.counters.observe("answer_seconds", now - stream.arrived)
    stream.wake.set()


def _fail(pool: Scheduler, stream: Stream, reason: str) -> None:
    stream.error = reason
    pool.counters.add("answers", "failed")
    stream.wake.set()


def _drop_worker(pool: Scheduler, index: int) -> None:
    """Forget a replica that has ended: its streams fail, the others go on."""
    worker = pool.workers[index]
    worker.link = worker.info = None
    worker.error = worker.error or "its process ended"
    lost, worker.streams = list(worker.streams.values()), {}
    for stream in lost:
        _fail(pool, stream, "the model's process failed while it was answering: try again")
