"""A generator's items made ahead of their use, in a thread that never outlives its purpose."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Nobody wants the work any more."""


def run_ahead(make: Callable[[Callable[[], None]], Iterator[T]], depth: int) -> Generator[T, None, None]:
    """Yield the items of an iterator that runs in its own thread, at most `depth` of them ahead.

    The thread starts with the first next(). It ends when the generator is closed or collected, and when the main
    thread ends.

    Args:
        make: called in the thread with a function `check`, returns the iterator. `check`, which long work should call
            now and then, raises `Stopped` once the thread should end. Whatever else the iterator raises is raised
            here, after the items made before.
        depth: items ready and waiting, 1 or more.
    """
    stop = threading.Event()
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    main = threading.main_thread()

    def stopped() -> bool:
        return stop.is_set() or not main.is_alive()

    def check() -> None:
        if stopped():
            raise Stopped

    def put(item: tuple[T] | BaseException | None) -> None:
        while not stopped():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for item in make(check):
                put((item,))
                check()
            put(None)
        except BaseException as error:
            put(error)

    # A daemon would be torn out of native code when the interpreter ends; this one sees that end coming and leaves.
    thread = threading.Thread(target=work, name="run-ahead", daemon=False)
    thread.start()
    try:
        while True:
            match ready.get():
                case (item,):
                    yield item
                case None:
                    return
                case error:
                    raise error
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):  # make room for a put() that waits
            while True:
                ready.get_nowait()
        if thread is not threading.current_thread():  # garbage is collected in any thread
            thread.join(timeout=5)
