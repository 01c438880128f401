"""A process that owns one device and answers many requests at once on it, and the server's handle of it.

It has an engine for each model; leaves that are equal in two models, such as what no adapter of a base changes, are
held once. The engines take turns, a step each.

Messages are tuples over a pipe. To the worker:
    ("new", key, request, model)                start an answer to an `infer.Request`, or score a `ScoreRequest`
    ("cancel", key)                             forget it
    ("end",)                                    exit
From the worker:
    ("ready", WorkerInfo, ...)                  the models are loaded
    ("tokens", [(key, token, finish, logprobs), ...])    the tokens of one step, in one message; see `infer.Event`
    ("scored", key, {index: SequenceLogprobs}, is_last)    some prompts of a `ScoreRequest`
    ("prefix_cache", prompts, tokens)           prompts that began with known tokens since the last such message
    ("refused", key, reason)                    this request cannot be answered
    ("failed", reason, is_fatal)                it exits; fatal: a restart would end in the same way
    ("exited",)                                 the process has exited; sent by the handle, once, as its last message
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from nanochat import checkpoint, infer, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import DTYPES
from nanochat.eval import likelihood
from nanochat.eval.likelihood import SequenceLogprobs
from nanochat.infer import Engine, Request
from nanochat.text import reason

CPU_NICE = 5  # a worker that computes on the CPU leaves the server, which needs little, the first turn
GPU_SCORE_TOKENS = 8192  # of a batch of prompts to score, which streams wait for
EXIT_SECONDS = 3.0  # for a process to exit when it is asked to, and again when it is killed
PREFIX_CONTEXTS = 4  # size of the prefix cache, in prompts of the full length, if it is not set
WORKER_OPTIONS = ("slots", "context", "compile", "exact", "prefix_tokens")  # of `infer.start`

Message = tuple[Any, ...]
Deliver = Callable[[Message], None]  # what a handle calls, from any thread, with each message of its worker


class ModelSource(NamedTuple):
    """A model to serve, under a name that no other has; see `checkpoint.load`."""

    name: str
    run: str
    step: int | None


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """What a worker loads and how it runs, `slots` and `prefix_tokens` for each model; see `infer.start`."""

    models: tuple[ModelSource, ...]
    device: str = "cpu"
    dtype: str = "auto"
    slots: int = 16
    context: int | None = None
    compile: bool = True
    exact: bool = False
    prefix_tokens: int | None = None


class ScoreRequest(NamedTuple):
    """Prompts whose log-probabilities are asked for, with those of alternatives; see `likelihood.token_logprobs`."""

    prompts: tuple[tuple[int, ...], ...]
    top: int


class WorkerInfo(NamedTuple):
    """A model that a worker is ready to answer with."""

    name: str
    step: int
    stage: str
    notice: str | None  # a remark for users of the model
    tokenizer: Tokenizer
    context: int
    slots: int
    device: str
    about: str  # all of it in a line


# The server's end


class WorkerHandle:
    """A worker's process, and two threads, so that its pipe never blocks the event loop."""

    def __init__(self, config: WorkerConfig, deliver: Deliver) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take CUDA and threads with it
        self._pipe, theirs = context.Pipe()
        name = f"worker on {config.device}"
        self._process = context.Process(target=main, args=(theirs, config), name=name, daemon=True)
        # A signal to the whole group (Ctrl-C, torchrun, a service manager) is for the server: it ends its workers last.
        resource_tracker.ensure_running()  # its start would unblock the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # the process inherits that
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # or the end of the process would not close the pipe
        self._writer = ThreadPoolExecutor(1, "write")
        self._reader = threading.Thread(target=self._read, args=(deliver,), name="read", daemon=True)
        self._reader.start()

    def send(self, message: Message) -> None:
        """Send without waiting; ignored after the worker's exit, which the reader reports."""
        self._writer.submit(self._pipe.send, message)

    def close(self) -> None:
        """End the worker and return when it has exited."""
        self.send(("end",))
        self._process.join(EXIT_SECONDS)
        if self._process.is_alive():  # it is loading, or hangs
            self._process.kill()
            self._process.join(EXIT_SECONDS)
        self._writer.shutdown(wait=False, cancel_futures=True)
        self._reader.join(EXIT_SECONDS)

    def _read(self, deliver: Deliver) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                deliver(self._pipe.recv())
        deliver(("exited",))


# The worker's end


def main(pipe: Connection, config: WorkerConfig) -> None:
    """Run a worker: the target of the process."""
    if config.device == "cpu":
        os.nice(CPU_NICE)
    threading.Thread(target=_exit_with_parent, name="exit with parent", daemon=True).start()
    try:
        engines, infos = load(config)
        gc.freeze()  # what is loaded stays: collecting it would hold up all streams
        pipe.send(("ready", *infos))
        serve_requests(pipe, engines)
    except (EOFError, ConnectionError):
        pass  # the server is gone
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError(f"{config.device} is out of memory: set fewer slots, a shorter context, or fewer models")
        is_fatal = isinstance(error, UserError)
        if not is_fatal:
            traceback.print_exc()
        message = str(error) if is_fatal else f"{type(error).__name__}: {reason(error)}"
        with contextlib.suppress(OSError):
            pipe.send(("failed", message, is_fatal))
        sys.exit(1)


def load(config: WorkerConfig) -> tuple[dict[str, Engine], list[WorkerInfo]]:
    """Load each model and start an engine with it."""
    device, dtype = torch.device(config.device), DTYPES.get(config.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    engines: dict[str, Engine] = {}
    infos = []
    for name, run, step in config.models:
        loaded = checkpoint.load(run, step=step, device=device, dtype=dtype)
        options: dict[str, Any] = {option: getattr(config, option) for option in WORKER_OPTIONS}
        if config.prefix_tokens is None:
            options["prefix_tokens"] = PREFIX_CONTEXTS * (config.context or loaded.config.sequence_len)
        engine = infer.start(loaded.params, loaded.config, loaded.tokenizer, device=device, dtype=dtype, **options)
        shared_bytes = sum(share_(engine.params, other.params) for other in engines.values())
        about = f"{checkpoint.describe_model(loaded)}, {config.slots} requests at once"
        if len(config.models) > 1:
            own_bytes = tree.nbytes(engine.params) - shared_bytes
            about += f"; {own_bytes / 1e6:.1f} MB of weights" + f" beside {shared_bytes / 1e6:.1f} MB shared" * bool(
                infos
            )
            about += f", {tree.nbytes(engine.cache) / 1e6:.1f} MB of cache"
        engines[name] = engine
        infos.append(
            WorkerInfo(
                name,
                loaded.step,
                loaded.stage,
                checkpoint.warning(loaded),
                dataclasses.replace(loaded.tokenizer),  # a copy without its caches
                engine.context,
                config.slots,
                torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                about,
            )
        )
    for engine in engines.values() if config.compile else ():
        infer.warm_up(engine)
    return engines, infos


def share_(params: dict[str, Any], other: Mapping[str, Any]) -> int:
    """Replace leaves by those of another model that are equal and have the same name; returns their bytes."""
    n_bytes = 0
    for name, x in params.items():
        if isinstance(x, dict):
            n_bytes += share_(x, other.get(name, {}))
        elif name in other and x is not other[name] and torch.equal(x, other[name]):
            params[name], n_bytes = other[name], n_bytes + tree.nbytes(x)
    return n_bytes


@dataclasses.dataclass(eq=False)
class _Model:
    """An engine, and what waits for it."""

    engine: Engine
    waiting: dict[int, Request] = dataclasses.field(default_factory=dict)
    # (prompts to score, their batches)
    scoring: dict[int, tuple[int, Iterator[dict[int, SequenceLogprobs]]]] = dataclasses.field(default_factory=dict)

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.scoring or self.engine.active)


def serve_requests(pipe: Connection, engines: Mapping[str, Engine]) -> None:
    """Answer requests until an "end" message: idle it waits for messages, busy it reads them between steps."""
    models = {name: _Model(engine) for name, engine in engines.items()}
    while True:
        while pipe.poll(0 if any(model.is_busy for model in models.values()) else None):
            match pipe.recv():
                case ("new", key, ScoreRequest() as request, name):
                    models[name].scoring[key] = len(request.prompts), score(engines[name], request)
                case ("new", key, request, name):
                    models[name].waiting[key] = request
                case ("cancel", key):
                    for model in models.values():
                        model.waiting.pop(key, None)
                        model.scoring.pop(key, None)
                        infer.cancel(model.engine, key)
                case _:
                    return
        busy = [model for model in models.values() if model.is_busy]
        for model in busy:
            _take_turn(pipe, model, others_wait=len(busy) > 1)


def _take_turn(pipe: Connection, model: _Model, others_wait: bool) -> None:
    """Admit requests, score one batch of prompts, which is about as long as a prompt's prefill, and decode a step."""
    engine, scoring = model.engine, model.scoring
    while model.waiting and infer.free_slots(engine):
        key = next(iter(model.waiting))
        try:
            infer.admit(engine, key, model.waiting.pop(key))
        except UserError as error:
            pipe.send(("refused", key, str(error)))
    if scoring:
        key = next(iter(scoring))
        n_prompts, batches = scoring.pop(key)
        scores = next(batches)
        if n_prompts > len(scores):
            scoring[key] = n_prompts - len(scores), batches
        pipe.send(("scored", key, scores, key not in scoring))
    events, prefixes = infer.step(engine, others_wait=others_wait), engine.prefill.prefixes
    if prefixes.hits:
        pipe.send(("prefix_cache", prefixes.hits, prefixes.tokens_saved))
        prefixes.hits = prefixes.tokens_saved = 0
    if events:
        pipe.send(("tokens", [(event.key, event.token, event.finish, event.logprobs) for event in events]))


def score(engine: Engine, request: ScoreRequest) -> Iterator[dict[int, SequenceLogprobs]]:
    """Yield the log-probabilities of some of the prompts after each batch."""
    on_cpu = engine.row_state["token"].device.type == "cpu"
    return likelihood.token_logprobs(
        engine.params,
        engine.config,
        request.prompts,
        top=request.top,
        tokens_per_batch=engine.context if on_cpu else max(engine.context, GPU_SCORE_TOKENS),
        compute=engine.compute,
    )


def _exit_with_parent() -> None:
    """Exit when the server does: loading or compiling, the main thread would not notice for minutes."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)
