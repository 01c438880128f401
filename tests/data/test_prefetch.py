"""Prefetching: order, errors, and a process that ends. Closing is part of the loader's tests."""

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator

import pytest

from nanochat.data.loader import prefetch


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def running() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_yields_the_items_in_order_and_ends() -> None:
    assert list(prefetch((i for i in range(100)), depth=3)) == list(range(100))
    odd = [None, (), StopIteration()]
    assert list(prefetch((item for item in odd), depth=1)) == odd
    assert wait_for(lambda: running() == 0)


def test_runs_at_most_depth_items_ahead() -> None:
    made = []

    def make() -> Generator[int, None, None]:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetch(make(), depth=4)
    assert made == [], "nothing runs before the first next()"
    assert next(items) == 0
    assert wait_for(lambda: len(made) == 5)  # one taken, four ready
    time.sleep(0.2)
    assert len(made) == 5
    items.close()


def test_error_is_raised_after_the_items_before_it() -> None:
    class Odd(Exception):
        pass

    def make() -> Generator[int, None, None]:
        yield from range(3)
        raise Odd("three")

    items = prefetch(make(), depth=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Odd, match="three"):
        next(items)
    assert wait_for(lambda: running() == 0)


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("raise RuntimeError", 1), ("next(stuck)", -2)])
@pytest.mark.slow
def test_process_exits_while_a_generator_is_open(ending: str, code: int) -> None:
    program = f"""
        import itertools, os, signal, threading, time
        from nanochat.data.loader import prefetch
        def slow():
            while True:
                time.sleep(4)
                yield
        items = prefetch((i for i in itertools.count()), depth=2)
        next(items)
        stuck = prefetch(slow(), depth=2)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start() if "stuck" in {ending!r} else None
        {ending}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    assert "Exception ignored" not in result.stderr and "Fatal" not in result.stderr
