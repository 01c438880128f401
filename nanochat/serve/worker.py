"""A process that owns one device and answers many requests at once on it, and the server's handle of it.

The messages, tuples over a pipe. To the worker:
    ("new", key, request)                       start an answer to an `infer.Request`
    ("cancel", key)                             forget it
    ("end",)                                    exit
From the worker:
    ("ready", WorkerInfo)                       the model is loaded
    ("tokens", [(key, token, finish), ...])     the tokens of one step, in one message
    ("refused", key, reason)                    this request cannot be answered
    ("failed", reason, is_fatal)                it exits; fatal: a restart would end in the same way
    ("exited",)                                 the process has exited; sent by the handle, once, as its last message

An idle worker waits for messages, a busy one reads them between steps. It exits when the other end of the pipe closes,
whatever happened to the process that held it.
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import torch

from nanochat import checkpoint, infer
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import DTYPES
from nanochat.infer import Engine, Request

CPU_NICE = 5  # a worker that computes on the CPU leaves the server, which needs little, the first turn
EXIT_SECONDS = 3.0  # for a process to exit when it is asked to, and again after each signal

Message = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """What a worker loads and how it runs.

    Attributes:
        run, step: as in `checkpoint.load`. dtype: auto, float32, bfloat16 or float16.
        slots: requests answered at once. context: tokens of a conversation, answer included; None: the model's.
        compile: compile the decode step. exact: as in `infer.start`.
    """

    run: str | None = None
    step: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    slots: int = 16
    context: int | None = None
    compile: bool = True
    exact: bool = False


class WorkerInfo(NamedTuple):
    """A worker that is ready: its model, and `notice`, a remark for users of it, or None; `about` is all in a line."""

    name: str
    step: int
    stage: str
    notice: str | None
    tokenizer: Tokenizer
    context: int
    slots: int
    device: str
    about: str


class WorkerHandle(Protocol):
    """A worker as the scheduler sees it."""

    def send(self, message: Message) -> None:
        """Send without waiting; ignored after the worker's exit."""
        ...

    def close(self) -> None:
        """End the worker and return when it has exited."""
        ...


Connect = Callable[[Callable[[Message], None]], WorkerHandle]
"""Starts a worker, given a function to call with each of its messages, from any thread."""


# The server's end


def start(config: WorkerConfig, deliver: Callable[[Message], None]) -> WorkerHandle:
    """Start a worker in a process of its own."""
    context = multiprocessing.get_context("spawn")  # a fork would take CUDA and threads with it
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, config), name=f"worker on {config.device}", daemon=True)
    process.start()
    theirs.close()  # or the end of the process would not close the pipe
    return _ProcessHandle(process, ours, deliver)


class _ProcessHandle:
    """A process and two threads, so that its pipe never blocks the event loop; see `WorkerHandle`."""

    def __init__(self, process: Any, pipe: Connection, deliver: Callable[[Message], None]) -> None:
        self._process, self._pipe, self._deliver = process, pipe, deliver
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def send(self, message: Message) -> None:
        self._outgoing.put(message)

    def close(self) -> None:
        self._outgoing.put(("end",))
        self._outgoing.put(None)
        self._process.join(EXIT_SECONDS)
        for signal_process in (self._process.terminate, self._process.kill):  # it is loading, or hangs
            if self._process.is_alive():
                signal_process()
                self._process.join(EXIT_SECONDS)
        for thread in self._threads:
            thread.join(EXIT_SECONDS)

    def _read(self) -> None:
        try:
            while True:
                self._deliver(self._pipe.recv())
        except (EOFError, OSError):
            pass
        self._outgoing.put(None)
        self._deliver(("exited",))

    def _write(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                self._pipe.send(message)
        except OSError:
            pass  # the reader sees the end as well, and reports it


# The worker's end


def main(pipe: Connection, config: WorkerConfig) -> None:
    """Run a worker: the target of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the server ends us
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
        reason = str(error) if is_fatal else f"{type(error).__name__}: {error}".splitlines()[0]
        with contextlib.suppress(OSError):
            pipe.send(("failed", reason, is_fatal))
        sys.exit(1)


def load(config: WorkerConfig) -> tuple[Engine, WorkerInfo]:
    """Load the model and start an engine with it.

    Raises:
        UserError: there is no such model, or it does not run here.
    """
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = DTYPES.get(config.dtype)
    loaded = checkpoint.load(config.run, step=config.step, device=device, dtype=dtype)
    engine = infer.start(
        loaded.params,
        loaded.config,
        loaded.tokenizer,
        slots=config.slots,
        context=config.context,
        device=device,
        dtype=dtype,
        compile=config.compile,
        exact=config.exact,
    )
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
    """Answer requests until an "end" message.

    Raises:
        EOFError, ConnectionError: the pipe is closed.
    """
    waiting: dict[int, Request] = {}
    running: set[int] = set()
    while True:
        while pipe.poll(0 if waiting or running else None):
            message = pipe.recv()
            if message[0] == "end":
                return
            if message[0] == "new":
                waiting[message[1]] = message[2]
            elif message[1] in running:
                running.remove(message[1])
                infer.cancel(engine, message[1])
            else:
                waiting.pop(message[1], None)
        if waiting and infer.free_slots(engine):
            key = next(iter(waiting))
            try:
                infer.admit(engine, key, waiting.pop(key))
                running.add(key)
            except UserError as error:
                pipe.send(("refused", key, str(error)))
        events = [(event.key, event.token, event.finish) for event in infer.step(engine)]
        running.difference_update(key for key, _, finish in events if finish)
        if events:
            pipe.send(("tokens", events))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # loading or compiling, the main thread would not notice for minutes
