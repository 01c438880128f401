"""The real server with a real engine in a thread: what clients get from a small model, without a process for it."""

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import scripted
from small_engine import TOKENIZER, start

from nanochat.serve import worker


class EngineWorker(worker.WorkerHandle):
    """A worker's loop in a thread."""

    def __init__(self, engines: Any, infos: list[worker.WorkerInfo], deliver: Callable[[Any], None]) -> None:
        self._pipe, theirs = multiprocessing.Pipe()

        def serve() -> None:
            with contextlib.suppress(EOFError, ConnectionError):
                worker.serve_requests(theirs, engines)
            theirs.close()

        def read() -> None:
            deliver(("ready", *infos))
            with contextlib.suppress(EOFError, OSError):
                while True:
                    deliver(self._pipe.recv())

        self._threads = [threading.Thread(target=target, daemon=True) for target in (serve, read)]
        for thread in self._threads:
            thread.start()

    def send(self, message: worker.Message) -> None:
        self._pipe.send(message)

    def close(self) -> None:
        self._pipe.send(("end",))
        for thread in self._threads:
            thread.join(10)


@contextlib.contextmanager
def serve(slots: int = 4, tokenizer: Any = TOKENIZER, engine: Any = None, **options: Any) -> Iterator[scripted.Server]:
    """Run the server with an engine of `small_engine`; options are those of `scripted.serve`."""
    engine = engine or start(slots)
    info = worker.WorkerInfo("small", 1, "sft", None, tokenizer, engine.context, slots, "cpu", "")
    with serve_models({"small": engine}, [info], **options) as server:
        yield server


@contextlib.contextmanager
def serve_models(engines: Any, infos: list[worker.WorkerInfo], **options: Any) -> Iterator[scripted.Server]:
    """Run the server with an engine for each model."""
    with scripted.serve({}, connect=lambda deliver: EngineWorker(engines, infos, deliver), **options) as server:
        yield server
