"""A process that owns one device and answers many requests at once on it, and the server's handle of it.

Messages are tuples over a pipe. To the worker:
    ("new", key, request)                       start an answer to an `infer.Request`, or score a `ScoreRequest`
    ("cancel", key)                             forget it
    ("end",)                                    exit
From the worker:
    ("ready", WorkerInfo)                       the model is loaded
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from nanochat import checkpoint, infer
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


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """What a worker loads and how it runs; see `checkpoint.load` and `infer.start`."""

    run: str | None = None
    step: int | None = None
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
    """A worker that is ready, and its model."""

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
        engine, info = load(config)
        gc.freeze()  # what is loaded stays: collecting it would hold up all streams
        pipe.send(("ready", info))
        serve_requests(pipe, engine)
    except (EOFError, ConnectionError):
        pass  # the server is gone
    except Exception as error:
        is_fatal = isinstance(error, UserError)
        if not is_fatal:
            traceback.print_exc()
        message = str(error) if is_fatal else f"{type(error).__name__}: {reason(error)}"
        with contextlib.suppress(OSError):
            pipe.send(("failed", message, is_fatal))
        sys.exit(1)


def load(config: WorkerConfig) -> tuple[Engine, WorkerInfo]:
    """Load the model and start an engine with it."""
    device, dtype = torch.device(config.device), DTYPES.get(config.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded = checkpoint.load(config.run, step=config.step, device=device, dtype=dtype)
    options: dict[str, Any] = {name: getattr(config, name) for name in WORKER_OPTIONS}
    if config.prefix_tokens is None:
        options["prefix_tokens"] = PREFIX_CONTEXTS * (config.context or loaded.config.sequence_len)
    engine = infer.start(loaded.params, loaded.config, loaded.tokenizer, device=device, dtype=dtype, **options)
    if config.compile:
        infer.warm_up(engine)
    return engine, WorkerInfo(
        loaded.name,
        loaded.step,
        loaded.stage,
        checkpoint.warning(loaded),
        dataclasses.replace(loaded.tokenizer),  # a copy without its caches
        engine.context,
        config.slots,
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        f"{checkpoint.describe_model(loaded)}, {config.slots} requests at once",
    )


def serve_requests(pipe: Connection, engine: Engine) -> None:
    """Answer requests until an "end" message: idle it waits for messages, busy it reads them between steps.

    Prompts are scored between steps as well, one batch at a time, which is about as long as a prompt's prefill.
    """
    waiting: dict[int, Request] = {}
    scoring: dict[int, tuple[int, Iterator[dict[int, SequenceLogprobs]]]] = {}  # (prompts to score, their batches)
    while True:
        while pipe.poll(0 if waiting or scoring or engine.active else None):
            match pipe.recv():
                case ("new", key, ScoreRequest() as request):
                    scoring[key] = len(request.prompts), score(engine, request)
                case ("new", key, request):
                    waiting[key] = request
                case ("cancel", key):
                    waiting.pop(key, None)
                    scoring.pop(key, None)
                    infer.cancel(engine, key)
                case _:
                    return
        while waiting and infer.free_slots(engine):
            key = next(iter(waiting))
            try:
                infer.admit(engine, key, waiting.pop(key))
            except UserError as error:
                pipe.send(("refused", key, str(error)))
        if scoring:
            key = next(iter(scoring))
            n_prompts, batches = scoring.pop(key)
            scores = next(batches)
            if n_prompts > len(scores):
                scoring[key] = n_prompts - len(scores), batches
            pipe.send(("scored", key, scores, key not in scoring))
        events, prefixes = infer.step(engine), engine.prefill.prefixes
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
