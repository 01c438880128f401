"""A process that owns one device and answers many requests at once on it; and the other end, which talks to it.

The messages, tuples over a pipe. To the replica:
    ("new", key, prompt, sampling)              begin an answer: token ids, `api.Sampling` with its seed
    ("cancel", key)                             forget it
    ("end",)                                    end
From the replica:
    ("ready", Info)                             the model is loaded
    ("tokens", [(key, token, finish), ...])     what one step gave, in one message
    ("refused", key, reason)                    this request cannot be answered
    ("failed", reason, hopeless)                it ends; hopeless: another start would end in the same way
    ("gone",)                                   the process has ended (said by the link, once, as its last message)

The replica is idle while nobody asks, looks for messages between steps, and ends when the other end of the pipe does,
whatever became of the process that held it. Its messages are taken by a thread: nothing here blocks an event loop.
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
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import torch

from nanochat import checkpoint, infer
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import DTYPES
from nanochat.infer import Engine, Request
from nanochat.serve.schema import Sampling

CPU_NICE = 5  # where a replica computes on the cores that the front needs a little of, and at once
END_SECONDS = 3.0  # that a process has to end when it is told so, and again when it gets a signal

Message = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a replica loads and how it runs.

    Attributes:
        run, step: as `pretrained.load` has them. device: as torch names it. dtype: auto, float32, bfloat16 or float16.
        slots: requests answered at once. context: tokens of a conversation, answer included; None: the model's.
        compile: compile the decode step. exact: as in `generate.start`.
    """

    run: str | None = None
    step: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    slots: int = 16
    context: int | None = None
    compile: bool = True
    exact: bool = False


class Info(NamedTuple):
    """What a replica says of itself when it is ready.

    Attributes:
        name, step, stage, notice: of the model; the notice is for whoever talks to it, or None.
        tokenizer: of the model. context: tokens, prompt included. slots: requests at once. device: in words.
        about: all of it in a line.
    """

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
    """A replica, seen from the front."""

    def send(self, message: Message) -> None:
        """Hand a message over, without waiting. After the end of the replica it goes nowhere."""
        ...

    def close(self) -> None:
        """End the replica and return when it has ended."""
        ...


Connect = Callable[[Callable[[Message], None]], WorkerHandle]
"""Starts a replica, given what is to be called with each of its messages (from any thread)."""


# The front's end


def start(settings: Settings, deliver: Callable[[Message], None]) -> WorkerHandle:
    """Start a replica in a process of its own. The last thing that it delivers is ("gone",)."""
    context = multiprocessing.get_context("spawn")  # a fork would take CUDA and threads with it
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, settings), name=f"replica on {settings.device}", daemon=True)
    process.start()
    theirs.close()  # else the end of the process would not be the end of the pipe
    return _ProcessLink(process, ours, deliver)


class _ProcessLink:
    """Two threads and a process; see `Link`."""

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
        self._process.join(END_SECONDS)
        for end in (self._process.terminate, self._process.kill):  # it is loading, or worse
            if self._process.is_alive():
                end()
                self._process.join(END_SECONDS)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(END_SECONDS)

    def _read(self) -> None:
        try:
            while True:
                self._deliver(self._pipe.recv())
        except (EOFError, OSError):
            pass
        self._outgoing.put(None)
        self._deliver(("gone",))

    def _write(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                self._pipe.send(message)
        except OSError:
            pass  # the reader sees the end as well, and says so


# The replica's end


def main(pipe: Connection, settings: Settings) -> None:
    """Run a replica: the target of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the front ends us
    if settings.device == "cpu":
        os.nice(CPU_NICE)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    try:
        decoder, info = load(settings)
        gc.freeze()  # what is loaded stays: looking through it would hold up all streams
        pipe.send(("ready", info))
        work(pipe, decoder)
    except (EOFError, ConnectionError):
        pass  # the front has gone
    except Exception as error:
        mistake = isinstance(error, UserError)
        if not mistake:
            traceback.print_exc()
        reason = str(error) if mistake else f"{type(error).__name__}: {error}".splitlines()[0]
        with contextlib.suppress(OSError):
            pipe.send(("failed", reason, mistake))
        sys.exit(1)


def load(settings: Settings) -> tuple[Engine, Info]:
    """Load the model and open a decoder with it.

    Raises:
        UserError: there is no such model, or it does not run here.
    """
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded = checkpoint.load(settings.run, step=settings.step, device=device, dtype=DTYPES.get(settings.dtype))
    decoder = infer.start(
        loaded.params,
        loaded.config,
        loaded.tokenizer,
        slots=settings.slots,
        context=settings.context,
        device=device,
        dtype=DTYPES.get(settings.dtype),
        compile=settings.compile,
        exact=settings.exact,
    )
    if settings.compile:
        infer.warm_up(decoder)
    return decoder, Info(
        loaded.name,
        loaded.step,
        loaded.stage,
        checkpoint.warning(loaded),
        dataclasses.replace(loaded.tokenizer),  # a copy without what it has computed
        decoder.context,
        settings.slots,
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        f"{checkpoint.describe_model(loaded)}, {settings.slots} requests at once",
    )


def work(pipe: Connection, decoder: Engine) -> None:
    """Answer requests until told to end.

    Raises:
        EOFError, ConnectionError: the pipe has ended.
    """
    waiting: deque[Message] = deque()
    running: set[int] = set()
    while True:
        while pipe.poll(0 if waiting or running else None):
            message = pipe.recv()
            if message[0] == "end":
                return
            if message[0] == "new":
                waiting.append(message)
            elif message[1] in running:
                running.remove(message[1])
                infer.cancel(decoder, message[1])
            else:
                waiting = deque(other for other in waiting if other[1] != message[1])
        if waiting and infer.free(decoder):
            _, key, prompt, sampling = waiting.popleft()
            try:
                infer.admit(decoder, key, _request(prompt, sampling))
                running.add(key)
            except UserError as error:
                pipe.send(("refused", key, str(error)))
        events = [(event.key, event.token, event.finish) for event in infer.step(decoder)]
        running.difference_update(key for key, _, finish in events if finish)
        if events:
            pipe.send(("tokens", events))


def _request(prompt: list[int], sampling: Sampling) -> Request:
    return Request(tuple(prompt), sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.seed or 0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # loading or compiling, the main thread would not notice for minutes
