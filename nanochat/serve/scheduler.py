"""One queue for all workers: which request gets a slot and when, and what happens to those of a worker that exits.

A free slot goes to the client with the fewest answers under way, then to the one whose last turn is longest ago: one
client with many requests holds up only itself.

Everything here runs in one event loop; workers deliver their messages from threads, through it.
"""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanochat.eval.likelihood import SequenceLogprobs
from nanochat.infer import Request, TokenLogprobs
from nanochat.serve.schema import ApiError, server_error
from nanochat.serve.worker import Deliver, Message, ScoreRequest, WorkerHandle, WorkerInfo

BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
RESTART_SECONDS = (1.0, 60.0)  # the first pause before a restart, and the longest; each is twice the one before
HANG_SECONDS = 120.0  # a worker with requests that is silent for longer is treated as hung
STABLE_SECONDS = 60.0  # a worker that ran for longer starts again after the first pause
MAX_TURNS = 10_000  # clients whose last turn is remembered
FINISHES = ("stop", "length", "cancelled", "failed")

Connect = Callable[[Deliver], WorkerHandle]  # starts a worker

CLIENT: ContextVar[str] = ContextVar("client", default="")  # whose request is being handled; set by the middleware

log = logging.getLogger("nanochat.serve")


@dataclasses.dataclass
class Stream:
    """An answer in progress: it waits, runs in a slot of a worker, and ends once, with a finish reason or an error."""

    key: int
    model: str
    request: Request | ScoreRequest
    wake: asyncio.Event  # set whenever there are new tokens, or the end
    client: str = ""
    worker: int | None = None  # index of the worker that runs it; None while it waits, or if it ended waiting
    tokens: list[int] = dataclasses.field(default_factory=list)  # that the client has not taken
    logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=list)  # one for each of `tokens`
    scores: dict[int, SequenceLogprobs] = dataclasses.field(default_factory=dict)  # of a ScoreRequest's prompts
    n_tokens: int = 0
    finish: str | None = None  # "stop" or "length" after a normal end
    error: ApiError | None = None  # the reason of any other end
    arrived: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclasses.dataclass
class Worker:
    """A worker and its streams."""

    connect: Connect
    handle: WorkerHandle | None = None
    models: dict[str, WorkerInfo] = dataclasses.field(default_factory=dict)  # while it is ready
    streams: dict[int, Stream] = dataclasses.field(default_factory=dict)
    restarts: int = 0
    error: str | None = None  # why it exited last
    last_heartbeat: float = 0.0  # when it last sent or got something

    @property
    def info(self) -> WorkerInfo | None:
        """The first model, while it is ready."""
        return next(iter(self.models.values()), None)

    def free_slots(self, model: str) -> int:
        active = sum(stream.model == model for stream in self.streams.values())
        return self.models[model].slots - active if model in self.models else 0


class Metrics:
    """What /metrics shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names: Any = {"namespace": "nanochat", "registry": self.registry}
        self.responses = Counter("responses", "HTTP responses.", ["code"], **names)
        self.answers = Counter("answers", "Answers by how they ended.", ["finish"], **names)
        self.tokens = Counter("tokens", "Generated tokens.", **names)
        self.model_answers = Counter("model_answers", "Answers of a model that have ended.", ["model"], **names)
        self.model_tokens = Counter("model_tokens", "Generated tokens of a model.", ["model"], **names)
        self.prefix_hits = Counter("prefix_cache_hits", "Prompts that began with known tokens.", **names)
        self.prefix_tokens = Counter("prefix_cache_tokens", "Prompt tokens that were not computed again.", **names)
        self.restarts = Counter("restarts", "Restarts of a worker.", ["gpu"], **names)
        names["buckets"] = BUCKETS_SECONDS
        self.first_token_seconds = Histogram("first_token_seconds", "From a request to its first token.", **names)
        self.answer_seconds = Histogram("answer_seconds", "From a request to the end of its answer.", **names)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"nanochat_{name}", labels) or 0.0


@dataclasses.dataclass
class Scheduler:
    """The workers and their queue."""

    workers: list[Worker]
    queue_limit: int
    metrics: Metrics
    models: dict[str, WorkerInfo] = dataclasses.field(default_factory=dict)  # as soon as a worker has been ready
    fatal_error: str | None = None  # why no worker can ever be ready
    draining: bool = False  # what was accepted is answered, and nothing more is accepted
    queue: dict[int, Stream] = dataclasses.field(default_factory=dict)
    keys: itertools.count = dataclasses.field(default_factory=itertools.count)
    turns: dict[str, int] = dataclasses.field(default_factory=dict)  # client -> when it last got a slot, latest last
    turn: itertools.count = dataclasses.field(default_factory=itertools.count)
    tasks: list[asyncio.Task] = dataclasses.field(default_factory=list)  # one for each worker, which keeps it running

    @property
    def info(self) -> WorkerInfo | None:
        """The first model, which answers requests that name none."""
        return next(iter(self.models.values()), None)

    @property
    def ready(self) -> bool:
        return any(worker.models for worker in self.workers)

    @property
    def active(self) -> int:
        """Number of answers that are being generated."""
        return sum(len(worker.streams) for worker in self.workers)

    def load_of(self, model: str) -> tuple[int, int]:
        """Return the numbers of a model's requests that wait, and that are being answered."""
        active = [stream for worker in self.workers for stream in worker.streams.values()]
        waiting, running = ([s for s in streams if s.model == model] for streams in (self.queue.values(), active))
        return len(waiting), len(running)


def create(connects: Sequence[Connect], queue_limit: int) -> Scheduler:
    """Return a scheduler whose workers are not started yet."""
    scheduler = Scheduler([Worker(connect) for connect in connects], queue_limit, Metrics())
    for name, about, value in (
        ("queue_length", "Requests that wait for a slot.", lambda: len(scheduler.queue)),
        ("active", "Requests that are being answered.", lambda: scheduler.active),
        ("ready", "1 if some worker can answer.", lambda: int(scheduler.ready)),
    ):
        gauge = Gauge(name, about, namespace="nanochat", registry=scheduler.metrics.registry)
        gauge.set_function(value)
    for index in range(len(scheduler.workers)):
        scheduler.metrics.restarts.labels(index)
    return scheduler


def start(scheduler: Scheduler) -> None:
    """Start the workers in the running event loop; they are ready later."""
    scheduler.tasks = [asyncio.create_task(_supervise(scheduler, index)) for index in range(len(scheduler.workers))]


async def stop(scheduler: Scheduler) -> None:
    """End all workers."""
    for task in scheduler.tasks:
        task.cancel()
    await asyncio.gather(*scheduler.tasks, return_exceptions=True)


def end_streams(scheduler: Scheduler) -> None:
    """End the streams that are under way when the time to drain is over."""
    running = [stream for worker in scheduler.workers for stream in worker.streams.values()]
    for stream in [*scheduler.queue.values(), *running]:
        cancel(scheduler, stream, shutting_down())


# Streams


def submit(
    scheduler: Scheduler, model: str, requests: Sequence[Request | ScoreRequest], wake: asyncio.Event
) -> list[Stream]:
    """Queue one stream for each request to a model, all of them or none."""
    if scheduler.draining:
        raise shutting_down()
    free = sum(worker.free_slots(model) for worker in scheduler.workers)
    waiting, _ = scheduler.load_of(model)
    if max(0, waiting + len(requests) - free) > scheduler.queue_limit:
        raise overloaded(f"{waiting} requests are waiting: try again later", _retry_seconds(scheduler, model, waiting))
    streams = [Stream(next(scheduler.keys), model, request, wake, CLIENT.get()) for request in requests]
    scheduler.queue.update((stream.key, stream) for stream in streams)
    _dispatch(scheduler)
    return streams


def cancel(scheduler: Scheduler, stream: Stream, error: ApiError | None = None) -> None:
    """End a stream that has not ended, and give its slot to the next."""
    if stream.ended:
        return
    if stream.worker is not None:
        worker = scheduler.workers[stream.worker]
        del worker.streams[stream.key]
        if worker.handle:
            worker.handle.send(("cancel", stream.key))
    scheduler.queue.pop(stream.key, None)
    _fail(scheduler, stream, error or ApiError(499, "cancelled"), "cancelled")
    _dispatch(scheduler)


def overloaded(message: str, retry_after_seconds: int) -> ApiError:
    return ApiError(503, message, type="overloaded_error", headers={"Retry-After": str(retry_after_seconds)})


def shutting_down() -> ApiError:
    return overloaded("the server is shutting down", 5)


def _retry_seconds(scheduler: Scheduler, model: str, waiting: int) -> int:
    """Estimate from the answers so far when a model's queue will have room."""
    slots = sum(worker.models[model].slots for worker in scheduler.workers if model in worker.models)
    n_answers, seconds = (scheduler.metrics.value(f"answer_seconds_{name}") for name in ("count", "sum"))
    mean_seconds = seconds / max(1, n_answers)
    return max(1, min(60, round(mean_seconds * waiting / slots))) if slots else 5


def _dispatch(scheduler: Scheduler) -> None:
    """Give free slots to streams that wait for their models."""
    while scheduler.queue:
        free = {}  # model: (most free slots, worker)
        for model in scheduler.models:
            best = max((worker.free_slots(model), -i) for i, worker in enumerate(scheduler.workers))
            if best[0] > 0:
                free[model] = best
        waiting = [stream for stream in scheduler.queue.values() if stream.model in free] if free else []
        if not waiting:
            return
        stream = _next_stream(scheduler, waiting)
        stream.worker = index = -free[stream.model][1]
        worker = scheduler.workers[index]
        assert worker.handle
        if not worker.streams:
            worker.last_heartbeat = time.monotonic()  # an idle worker is silent
        worker.streams[stream.key] = stream
        worker.handle.send(("new", stream.key, stream.request, stream.model))


def _next_stream(scheduler: Scheduler, waiting: Sequence[Stream]) -> Stream:
    """Take one of the streams from the queue."""
    turns = scheduler.turns
    active = collections.Counter(stream.client for worker in scheduler.workers for stream in worker.streams.values())
    stream = min(waiting, key=lambda s: (active[s.client], turns.get(s.client, -1), s.key))
    turns.pop(stream.client, None)
    turns[stream.client] = next(scheduler.turn)
    if len(turns) > MAX_TURNS:
        del turns[next(iter(turns))]
    return scheduler.queue.pop(stream.key)


def _add(
    scheduler: Scheduler,
    worker: Worker,
    stream: Stream,
    token: int,
    finish: str | None,
    logprobs: TokenLogprobs | None,
) -> None:
    metrics = scheduler.metrics
    if stream.n_tokens == 0:
        metrics.first_token_seconds.observe(time.perf_counter() - stream.arrived)
    stream.tokens.append(token)
    stream.logprobs.append(logprobs)
    stream.n_tokens += 1
    metrics.tokens.inc()
    metrics.model_tokens.labels(stream.model).inc()
    if finish:
        _finish(scheduler, worker, stream, finish)
    stream.wake.set()


def _finish(scheduler: Scheduler, worker: Worker, stream: Stream, finish: str) -> None:
    stream.finish = finish
    del worker.streams[stream.key]
    scheduler.metrics.answers.labels(finish).inc()
    scheduler.metrics.model_answers.labels(stream.model).inc()
    scheduler.metrics.answer_seconds.observe(time.perf_counter() - stream.arrived)
    stream.wake.set()


def _fail(scheduler: Scheduler, stream: Stream, error: ApiError, finish: str = "failed") -> None:
    stream.error = error
    scheduler.metrics.answers.labels(finish).inc()
    stream.wake.set()


# Workers


async def _supervise(scheduler: Scheduler, index: int) -> None:
    """Start a worker, and restart it whenever it exits, until cancelled."""
    loop, worker, pause = asyncio.get_running_loop(), scheduler.workers[index], RESTART_SECONDS[0]
    while True:
        inbox: asyncio.Queue[Message] = asyncio.Queue()

        def deliver(message: Message, inbox: asyncio.Queue[Message] = inbox) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody is interested any more
                loop.call_soon_threadsafe(inbox.put_nowait, message)

        handle = worker.handle = worker.connect(deliver)
        started = time.monotonic()
        try:
            while (message := await _next_message(worker, inbox)) != ("exited",):
                _handle(scheduler, worker, message)
        finally:
            worker.handle, worker.models = None, {}
            worker.error = worker.error or "its process ended"
            lost, worker.streams = worker.streams, {}
            for stream in lost.values():
                _fail(scheduler, stream, server_error("the model's process failed while it was answering: try again"))
            await asyncio.shield(loop.run_in_executor(None, handle.close))
        if scheduler.fatal_error:
            return
        if time.monotonic() - started > STABLE_SECONDS:
            pause = RESTART_SECONDS[0]
        log.error("worker %d exited (%s); restarting it in %g s", index, worker.error, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, RESTART_SECONDS[1])
        worker.restarts += 1
        scheduler.metrics.restarts.labels(index).inc()


async def _next_message(worker: Worker, inbox: asyncio.Queue[Message]) -> Message:
    """Return a worker's next message; "exited" for a worker that hangs, whose process is then ended."""
    while True:
        try:
            async with asyncio.timeout(HANG_SECONDS):
                return await inbox.get()
        except TimeoutError:
            if worker.streams and time.monotonic() - worker.last_heartbeat >= HANG_SECONDS:
                worker.error = f"it hung: no message for {HANG_SECONDS:g} s"
                return ("exited",)


def _handle(scheduler: Scheduler, worker: Worker, message: Message) -> None:
    worker.last_heartbeat = time.monotonic()
    match message:
        case ("tokens", new):
            for key, token, finish, logprobs in new:
                if stream := worker.streams.get(key):  # a cancel and a token may cross
                    _add(scheduler, worker, stream, token, finish, logprobs)
        case ("scored", key, scores, is_last):
            if stream := worker.streams.get(key):
                stream.scores |= scores
                if is_last:
                    _finish(scheduler, worker, stream, "stop")
        case ("prefix_cache", prompts, tokens):
            scheduler.metrics.prefix_hits.inc(prompts)
            scheduler.metrics.prefix_tokens.inc(tokens)
        case ("ready", *infos):
            worker.models = scheduler.models = {info.name: info for info in infos}
            worker.error = None
        case ("refused", key, reason):
            if stream := worker.streams.pop(key, None):
                _fail(scheduler, stream, server_error(reason))
        case ("failed", reason, is_fatal):
            worker.error = reason
            if is_fatal and not scheduler.models:
                scheduler.fatal_error = reason
    _dispatch(scheduler)
