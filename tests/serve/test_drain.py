"""What happens to requests under way after a signal, with the server as a process of its own (helpers/scripted.py)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import scripted

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
REPLIES = {"short": ["a", 1.0, "b"], "long": ["a", 60.0, "b"]}
KINDS = {"chat": ("/chat/completions", {}), "stream": ("/v1/chat/completions", {"stream": True})}
KINDS |= {"plain": ("/v1/chat/completions", {})}


@contextlib.contextmanager
def serve(grace_seconds: float) -> Iterator[tuple["subprocess.Popen[str]", httpx.Client]]:
    command = [sys.executable, scripted.__file__, json.dumps(REPLIES), str(grace_seconds)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        try:
            assert process.stdout
            url, limits = f"http://127.0.0.1:{int(process.stdout.readline())}", httpx.Limits(max_connections=None)
            with httpx.Client(base_url=url, limits=limits, timeout=60) as http:
                yield process, http
        finally:
            process.kill()


def ask(http: httpx.Client, kind: str, content: str) -> httpx.Response:
    path, more = KINDS[kind]
    return http.post(path, json={"messages": [{"role": "user", "content": content}], **more})


def ask_all(http: httpx.Client, pool: ThreadPoolExecutor, requests: list[tuple[str, str]]) -> list[Any]:
    """Send requests (kind, content); returns them with their futures as soon as all are being answered."""
    asked = [(kind, content, pool.submit(ask, http, kind, content)) for kind, content in requests]
    end = time.monotonic() + 60
    while http.get("/stats").json()["active"] < len(asked):
        assert time.monotonic() < end
    return asked


def assert_answered(kind: str, response: httpx.Response) -> None:
    end = {"stream": "data: [DONE]", "chat": 'data: {"done":true,"finish_reason":"stop"}', "plain": response.text}[kind]
    assert response.status_code == 200 and response.text.strip().endswith(end) and "b" in response.text


def assert_cut(kind: str, response: httpx.Response) -> None:
    if kind == "plain":
        return assert_refused(response)
    first, *_, last = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert response.status_code == 200 and "error" not in first
    error = json.loads(last)["error"]
    assert error["type"] == "overloaded_error" and "shutting down" in error["message"]


def assert_refused(response: httpx.Response) -> None:
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    assert response.headers["connection"] == "close" and "shutting down" in response.json()["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_under_way_have_the_grace_period(number: int) -> None:
    with serve(2.5) as (process, http), ThreadPoolExecutor(24) as pool:
        asked = ask_all(http, pool, [(kind, content) for kind in KINDS for content in REPLIES] * 4)
        start = time.monotonic()
        for _ in range(2):  # to the group, and passed on by a parent
            os.killpg(process.pid, number)
        while (health := http.get("/health")).status_code == 200:
            time.sleep(0.02)
        assert health.status_code == 503 and health.headers["connection"] == "close"
        assert (health.json()["status"], health.json()["ready"]) == ("draining", False)
        for kind in KINDS:
            assert_refused(ask(http, kind, "short"))
        for kind, content, future in asked:
            (assert_answered if content == "short" else assert_cut)(kind, future.result())
        assert 2.4 < time.monotonic() - start < 20
        assert process.wait(60) == 0
        stopping = "stopping; requests under way: 24, for 2.5 s at most; again to stop at once\n"
        assert process.stderr and process.stderr.read() == stopping


def test_second_signal_stops_at_once() -> None:
    with serve(30) as (process, http), ThreadPoolExecutor(3) as pool:
        asked = ask_all(http, pool, [(kind, "long") for kind in KINDS])
        process.terminate()
        time.sleep(0.5)
        process.terminate()
        start = time.monotonic()
        for kind, _, future in asked:
            assert_cut(kind, future.result())
        assert process.wait(60) == 128 + signal.SIGTERM and time.monotonic() - start < 20  # of 30
