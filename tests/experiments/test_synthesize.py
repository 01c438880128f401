"""Synthetic conversations from a local endpoint that answers well, badly, slowly, or not at all."""

import dataclasses
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ranks

from experiments import synthesize
from nanochat import distributed, tasks
from nanochat.config import UserError

TALK = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello!\nI am nanochat."}]


def completion(text: Any, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def good(*messages: Any) -> dict[str, Any]:
    return completion(json.dumps({"messages": messages or TALK}))


class Request(NamedTuple):
    time: float
    path: str
    key: str | None
    body: dict[str, Any]


class Endpoint(ThreadingHTTPServer):
    """Runs the experiment, answers its requests with `answer(seed, attempt)`, and records them.

    An answer is a status, a body (JSON, raw bytes, or seconds to wait before a good one), and headers.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, output: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.output, self.requests = output, list[Request]()
        self.answer: Callable[[int, int], tuple[Any, ...]] = lambda seed, attempt: (200, good())
        self.config = synthesize.Config(
            "large", f"http://127.0.0.1:{self.server_port}/v1", output=output, count=12, workers=4, backoff_seconds=0.01
        )

    def run(self, **changes: Any) -> list[int]:
        """Return the seeds that were requested."""
        self.requests.clear()
        synthesize.run(dataclasses.replace(self.config, **changes), distributed.init("cpu"))
        return sorted(request.body["seed"] for request in self.requests)

    def rows(self) -> list[dict[str, Any]]:
        return sorted(map(json.loads, self.output.read_text("utf-8").splitlines()), key=lambda row: row["seed"])

    def seeds(self) -> list[int]:
        return [row["seed"] for row in self.rows()]

    def handle_error(self, *_: Any) -> None:
        """Print nothing about clients that have disconnected."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(Request(time.monotonic(), self.path, self.headers.get("Authorization"), body))
        attempt, seed = divmod(body["seed"], 1_000_003)
        status, answer, *headers = self.server.answer(seed, attempt)
        if isinstance(answer, float):
            time.sleep(answer)
            answer = good()
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in [("Content-Length", str(len(content))), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Endpoint(base / "out.jsonl") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_conversations_are_requested_and_written(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    assert endpoint.run() == list(range(12))
    assert endpoint.rows() == [{"messages": TALK, "seed": seed, "model": "large"} for seed in range(12)]
    assert {(r.key, r.path) for r in endpoint.requests} == {("Bearer sk-secret", "/v1/chat/completions")}
    body = next(r.body for r in endpoint.requests if r.body["seed"] == 3)
    prompt = synthesize.build_prompt(synthesize.prompt_sections()["facts"], 3)
    assert body["messages"] == [{"role": "user", "content": prompt}]
    assert (body["model"], body["temperature"]) == ("large", 1.0)
    assert body["response_format"]["json_schema"]["schema"] == synthesize.SCHEMA
    out = capsys.readouterr().out
    assert "12 conversations, 0 of them are in" in out and f"12 written to {endpoint.output}" in out
    assert f"--experiment=tasks --set task=identity:{endpoint.output}" in out and "sk-secret" not in out
    for name in ("identity:all", "customjson"):
        task = tasks.from_text(f"{name}:{endpoint.output}")
        assert task.size == 12 and task.row(0)["messages"] == TALK


def test_prompts_are_drawn_from_the_seed():
    prompts = [synthesize.build_prompt("- It is FACT.", seed) for seed in range(300)]
    assert len(set(prompts)) > 290 and all("- It is FACT." in text and "$" not in text for text in prompts)
    for name in ("topics", "personas", "openings"):
        options = synthesize.prompt_sections()[name].splitlines()
        assert len(options) > 10 and all(any(option in text for text in prompts) for option in options)


def test_same_command_resumes(endpoint: Endpoint):
    endpoint.run(count=5)
    with endpoint.output.open("ab") as file:
        file.write(b'{"messages": [{"role": "user", "con')  # killed while writing
    assert endpoint.run() == list(range(5, 12)) and endpoint.seeds() == list(range(12))
    assert endpoint.run() == endpoint.run(seed=4, count=8) == []
    endpoint.output.write_bytes(endpoint.output.read_bytes().rstrip(b"\n"))  # by an editor
    endpoint.run(count=13)
    assert endpoint.seeds() == list(range(13))


def test_file_of_something_else_is_not_changed(endpoint: Endpoint):
    text = f"{json.dumps(TALK)}\n{json.dumps(TALK)}"
    endpoint.output.write_text(text)
    with pytest.raises(UserError, match=r"out.jsonl line 1: not written by synthesize; choose another file"):
        endpoint.run()
    assert endpoint.output.read_text() == text and not endpoint.requests


def test_key_facts_and_schema_are_optional(endpoint: Endpoint, tmp_path: Path):
    (tmp_path / "facts.txt").write_text("It is called Otto.")
    endpoint.run(key_variable=None, facts=tmp_path / "facts.txt", schema=False, count=1)
    (request,) = endpoint.requests
    assert request.key is None and "response_format" not in request.body
    assert "It is called Otto." in request.body["messages"][0]["content"]


MALFORMED: list[Any] = [
    b"<html>",
    b"[]",
    {"choices": []},
    completion(None),
    completion(json.dumps({"messages": TALK})[:-4], "length"),
    completion(json.dumps(TALK)),
    completion(json.dumps({"messages": TALK, "note": 1})),
    completion(json.dumps({"messages": "hello"})),
    good(TALK[0]),
    good(TALK[1], TALK[0]),
    good(TALK[0], TALK[0]),
    good(*TALK, TALK[0]),
    good({"role": "system", "content": "s"}, *TALK),
    good(*TALK * 9),
    *(good(TALK[0], {"role": "assistant", "content": content}) for content in (" ", "x" * 5000, ["a"])),
    good(TALK[0], {"role": "assistant", "content": "a", "name": "b"}),
    completion("x" * 2**21),
]


def test_malformed_answers_are_retried(endpoint: Endpoint):
    endpoint.answer = lambda seed, attempt: (200, [*MALFORMED, good()][attempt])
    attempts = len(MALFORMED) + 1
    seeds = endpoint.run(count=1, attempts=attempts, backoff_seconds=0)
    assert seeds == [1_000_003 * attempt for attempt in range(attempts)]
    assert endpoint.rows() == [{"messages": TALK, "seed": 0, "model": "large"}]


@pytest.mark.parametrize("text", ["```json\n{}\n```", "```\n{}```", " {} \n"])
def test_answer_may_be_in_a_code_block(text: str):
    padded = [{"role": m["role"], "content": f" {m['content']}\n"} for m in TALK]
    assert synthesize.parse_messages(text.replace("{}", json.dumps({"messages": padded}))) == TALK


def test_overloaded_endpoint_is_retried_with_backoff(endpoint: Endpoint):
    def waits(*statuses: Any, **settings: Any) -> list[float]:
        endpoint.answer = lambda seed, attempt: [*statuses, (200, good())][attempt]
        endpoint.run(count=1, **settings)
        times = [request.time for request in endpoint.requests]
        return [later - sooner for sooner, later in itertools.pairwise(times)]

    first = waits((408, b""), (429, b""), (503, b""), (500, b""), backoff_seconds=0.05)
    assert all(wait >= least for wait, least in zip(first, (0.05, 0.1, 0.2, 0.4), strict=True))
    (asked,) = waits((429, b"", ("Retry-After", "1")), seed=1)
    assert asked >= 1 and endpoint.seeds() == [0, 1]


def test_timeout_is_retried_and_requests_are_concurrent(endpoint: Endpoint):
    endpoint.answer = lambda seed, attempt: (200, 60.0 if attempt == 0 else good())
    endpoint.run(count=4, timeout_seconds=2)
    assert endpoint.seeds() == [0, 1, 2, 3]
    times = [request.time - endpoint.requests[0].time for request in endpoint.requests]
    assert times[3] < 1.5 and times[-1] < 50


def test_failures_are_reported_and_retried_by_the_same_command(endpoint: Endpoint):
    endpoint.answer = lambda seed, attempt: (500 if seed == 2 else 200, completion("?") if seed == 3 else good())
    with pytest.raises(UserError, match=r"2 of 12 failed: .*; the same command retries them") as caught:
        endpoint.run(attempts=2)
    assert "HTTP 500 (1x)" in str(caught.value) and "the answer is not valid JSON (1x)" in str(caught.value)
    assert endpoint.seeds() == [0, 1, *range(4, 12)]
    endpoint.answer = lambda seed, attempt: (200, good())
    assert endpoint.run() == [2, 3] and endpoint.seeds() == list(range(12))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the request: HTTP 401 no such key: …; is the key in OPENAI_API_KEY right\?"),
        (404, r"HTTP 404 .*are base_url and model right"),
        (400, r"10 .* in a row failed.*HTTP 400 no such key: …; if it does not support JSON schemas: .*schema=false"),
    ],
)
def test_refusal_stops_the_run(endpoint: Endpoint, status: int, message: str):
    endpoint.answer = lambda seed, attempt: (status, {"error": {"message": "no such key: sk-secret\nsecond line"}})
    with pytest.raises(UserError, match=message) as caught:
        endpoint.run(count=1000)
    assert len(endpoint.requests) <= (20 if status == 400 else 4), "each once"
    assert "sk-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_unreachable_endpoint_stops_the_run(endpoint: Endpoint):
    with pytest.raises(UserError, match=r"10 conversations in a row failed, the last: cannot connect to http://127"):
        endpoint.run(base_url="http://127.0.0.1:9/v1", attempts=2, count=1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "set the model's name at the endpoint: --set model="),
        ({"key_variable": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY holds no API key: export NO_SUCH_KEY="),
        ({"facts": Path("/no/such.txt")}, r"facts=/no/such.txt cannot be read: No such file"),
        ({"output": Path("/proc/no/out.jsonl")}, "/proc/no/out.jsonl cannot be written"),
        ({"output": Path("/")}, r"/ cannot be read: Is a directory"),
        ({"timeout_seconds": 0.0}, "timeout_seconds=0.0: must be above 0"),
    ],
)
def test_wrong_settings_fail_before_any_request(endpoint: Endpoint, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        endpoint.run(**changes)
    assert not endpoint.requests


@pytest.mark.slow
def test_ctrl_c_keeps_finished_conversations_and_does_not_wait(endpoint: Endpoint):
    endpoint.answer = lambda seed, attempt: (200, good() if seed < 3 else 60.0)
    settings = {"model": "m", "workers": 3, "base_url": endpoint.config.base_url, "output": endpoint.output}
    words = [f"--set={name}={value}" for name, value in settings.items()]
    with ranks.start_launch(1, "--experiment=synthesize", *words) as job:
        job.until(lambda: len(endpoint.requests) == 6 and endpoint.output.read_bytes().count(b"\n") == 3)
        job.send_signal(signal.SIGINT)
        (finished,) = job.wait(50)
    assert finished.code == 130 and "stopped by Ctrl-C" in finished.err
    assert endpoint.seeds() == [0, 1, 2]
