"""Many clients: whose turn it is, how often each may ask, and what is counted of the prefix cache."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import scripted
from small_engine import prompt, start

from nanochat import infer
from nanochat.serve import middleware, scheduler, worker
from nanochat.serve.schema import ApiError


def ask(server: scripted.Server, text: str, address: str = "127.0.0.1") -> httpx.Response:
    """Send a request from an address of this machine."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=60) as http:
        body = {"messages": [{"role": "user", "content": text}]}
        return http.post(server.url + "/v1/chat/completions", json=body)


def wait_for(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_client_with_many_requests_does_not_hold_up_others() -> None:
    waiting = [*[("busy", "127.0.0.1")] * 6, *[("calm", "127.0.0.2")] * 2]
    with scripted.serve({"first": ["x", 60.0], "": ["x"]}, slots=1) as server, ThreadPoolExecutor(8) as pool:
        url, body = server.url + "/chat/completions", {"messages": [{"role": "user", "content": "first"}]}
        with httpx.stream("POST", url, json=body):  # holds the slot until all others wait
            answers = []
            for name, address in waiting:
                answers.append(pool.submit(ask, server, name, address))
                wait_for(lambda: len(server.scheduler.queue) == len(answers))
        assert all(answer.result().status_code == 200 for answer in answers)
        messages = [message for message, _ in server.requests]
    assert messages == ["first", "calm", "busy", "calm", *["busy"] * 5]


def test_rate_of_a_client_is_limited() -> None:
    with scripted.serve({"": ["x"]}, requests_per_minute=2.0) as server:
        assert [ask(server, "x").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(server, "x")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 20 <= int(refused.headers["retry-after"]) <= 30
        assert ask(server, "x", "127.0.0.2").status_code == 200
        assert httpx.get(server.url + "/stats").json()["answers"] == {"stop": 3}


def test_rate_limiter_allows_the_rate_and_forgets_quiet_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(middleware.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(middleware, "MAX_CLIENTS", 5)
    limiter = middleware.RateLimiter(6.0)
    n_allowed = 0
    for _ in range(600):  # ten minutes, a request a second
        now[0] += 1
        try:
            limiter.check("eager")
            n_allowed += 1
        except ApiError as error:
            assert error.status_code == 429
    assert n_allowed == 6 + 59  # a minute's worth at once, then one every ten seconds
    for i in range(50):
        now[0] += 100
        limiter.check(f"client {i}")
    assert len(limiter._paid_until) <= 6


def test_worker_reports_the_prefix_cache_and_metrics_show_it() -> None:
    engine = start(slots=1)
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=worker.serve_requests, args=(theirs, {"small": engine}))
    thread.start()
    received: list[Any] = []
    for key in range(3):
        ours.send(("new", key, infer.Request((*prompt(64), key), max_tokens=1, logprobs=1), "small"))
        while not received or received[-1][0] != "tokens":
            assert ours.poll(20)
            received.append(ours.recv())
        ((_, _, _, logprobs),) = received.pop()[1]
        assert logprobs.logprob <= 0 and len(logprobs.top) == 1
    ours.send(("end",))
    thread.join(10)
    assert received == [("prefix_cache", 1, 64), ("prefix_cache", 1, 64)]
    with scripted.serve({}) as server:
        for message in received:
            scheduler._handle(server.scheduler, server.scheduler.workers[0], message)
        text = httpx.get(server.url + "/metrics").text
    assert "nanochat_prefix_cache_hits_total 2.0" in text and "nanochat_prefix_cache_tokens_total 128.0" in text
