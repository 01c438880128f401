"""Synthetic conversations from a local endpoint that answers well, badly, slowly, or not at all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from experiments import synthesize
from nanochat import distributed, tasks
from nanochat.config import UserError

ROOT = Path(__file__).resolve().parents[2]
TALK = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello!\nI am nanochat."}]


def completion(text: Any, finish: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def good(*messages: Any) -> dict[str, Any]:
    return completion(json.dumps({"messages": messages or TALK}))


Answer = Callable[[int, int], tuple[int, Any, dict[str, str]]]
"""(seed, attempt) -> status, body (JSON, raw bytes, or seconds to wait before a good answer), headers."""


class Endpoint(ThreadingHTTPServer):
    """Responds as `answer` says and records the requests."""

    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = lambda seed, attempt: (200, good(), {})
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.paths: set[str] = set()

    def handle_error(self, *_: Any) -> None:
        """Print nothing about clients that have disconnected."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.times.append(time.monotonic())
        self.server.paths.add(self.path)
        attempt, seed = divmod(body["seed"], 1_000_003)
        status, answer, headers = self.server.answer(seed, attempt)
        if isinstance(answer, float):
            time.sleep(answer)
            answer = good()
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> synthesize.Config:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    return synthesize.Config(
        model="large",
        base_url=f"http://127.0.0.1:{endpoint.server_port}/v1",
        output=tmp_path / "out.jsonl",
        count=12,
        workers=4,
        timeout_seconds=10,
        backoff_seconds=0.01,
    )


def run(config: synthesize.Config, **changes: Any) -> None:
    synthesize.run(dataclasses.replace(config, **changes), distributed.init("cpu"))


def lines(config: synthesize.Config) -> list[dict[str, Any]]:
    assert config.output
    return [json.loads(line) for line in config.output.read_text("utf-8").splitlines()]


def seeds(config: synthesize.Config) -> list[int]:
    return sorted(line["seed"] for line in lines(config))


def test_conversations_are_requested_and_written(
    settings: synthesize.Config, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings)
    assert seeds(settings) == list(range(12))
    assert all(line["messages"] == TALK and line["model"] == "large" for line in lines(settings))
    assert set(endpoint.keys) == {"Bearer sk-secret"} and endpoint.paths == {"/v1/chat/completions"}
    body = next(body for body in endpoint.bodies if body["seed"] == 3)
    assert body["model"] == "large" and body["temperature"] == 1.0
    prompt = synthesize.build_prompt(synthesize.prompt_sections()["facts"], 3)
    assert body["messages"] == [{"role": "user", "content": prompt}]
    assert body["response_format"]["json_schema"]["schema"] == synthesize.SCHEMA
    out = capsys.readouterr().out
    assert "12 conversations, 0 of them are in" in out and f"12 written to {settings.output}" in out
    assert f"--experiment=tasks --set task=identity:{settings.output}" in out and "sk-secret" not in out
    some = tasks.from_text(f"identity:all:{settings.output}")
    assert some.size == 12 and some.row(0)["messages"] == TALK
    assert tasks.from_text(f"customjson:{settings.output}").size == 12


def test_prompts_are_drawn_from_the_seed() -> None:
    prompts = [synthesize.build_prompt("- It is FACT.", seed) for seed in range(300)]
    assert len(set(prompts)) > 290 and all("- It is FACT." in text and "$" not in text for text in prompts)
    for name in ("topics", "personas", "openings"):
        options = synthesize.prompt_sections()[name].splitlines()
        assert len(options) > 10 and all(any(option in text for text in prompts) for option in options)


def test_same_command_resumes(settings: synthesize.Config, endpoint: Endpoint) -> None:
    run(settings, count=5)
    assert settings.output
    with settings.output.open("ab") as file:
        file.write(b'{"messages": [{"role": "user", "con')  # killed while writing
    endpoint.bodies.clear()
    run(settings)
    assert sorted(body["seed"] for body in endpoint.bodies) == list(range(5, 12))
    assert seeds(settings) == list(range(12))
    endpoint.bodies.clear()
    run(settings)
    run(settings, seed=4, count=8)
    assert endpoint.bodies == []
    settings.output.write_bytes(settings.output.read_bytes().rstrip(b"\n"))  # by an editor
    run(settings, count=13)
    assert seeds(settings) == list(range(13))


def test_file_of_something_else_is_not_changed(settings: synthesize.Config, endpoint: Endpoint) -> None:
    assert settings.output
    settings.output.write_text(f"{json.dumps(TALK)}\n{json.dumps(TALK)}")
    with pytest.raises(UserError, match=r"out.jsonl line 1: not written by synthesize; choose another file"):
        run(settings)
    assert settings.output.read_text() == f"{json.dumps(TALK)}\n{json.dumps(TALK)}" and not endpoint.bodies


def test_key_facts_and_schema_are_optional(settings: synthesize.Config, endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "facts.txt").write_text("It is called Otto.")
    run(settings, key_variable=None, facts=tmp_path / "facts.txt", schema=False, count=2)
    assert endpoint.keys == [None, None] and "response_format" not in endpoint.bodies[0]
    assert "It is called Otto." in endpoint.bodies[0]["messages"][0]["content"]


BAD: list[Any] = [
    b"<html>",
    b"[]",
    {"choices": []},
    {"choices": [{"message": None}]},
    completion(None),
    completion("I would rather not."),
    completion(json.dumps({"messages": TALK})[:-4], "length"),
    completion(json.dumps(TALK)),
    completion(json.dumps({"messages": TALK, "note": 1})),
    completion(json.dumps({"messages": "hello"})),
    good(TALK[0]),
    good(TALK[1], TALK[0]),
    good(TALK[0], TALK[0]),
    good(*TALK, TALK[0]),
    good(TALK[0], {"role": "assistant", "content": " "}),
    good(TALK[0], {"role": "assistant", "content": "x" * 5000}),
    good(TALK[0], {"role": "assistant", "content": ["a"]}),
    good(TALK[0], {"role": "assistant", "content": "a", "name": "b"}),
    good({"role": "system", "content": "s"}, *TALK),
    good(*TALK * 9),
    completion("x" * 2**21),
]


def test_malformed_answers_are_retried(settings: synthesize.Config, endpoint: Endpoint) -> None:
    endpoint.answer = lambda seed, attempt: (200, [*BAD, good()][attempt], {})
    run(settings, count=1, attempts=len(BAD) + 1, backoff_seconds=0)
    assert lines(settings) == [{"messages": TALK, "seed": 0, "model": "large"}]
    assert [body["seed"] for body in endpoint.bodies] == [1_000_003 * attempt for attempt in range(len(BAD) + 1)]


@pytest.mark.parametrize("text", ["```json\n{}\n```", "```\n{}```", " {} \n"])
def test_answer_may_be_in_a_code_block(text: str) -> None:
    padded = [{"role": m["role"], "content": f" {m['content']}\n"} for m in TALK]
    assert synthesize.parse_messages(text.replace("{}", json.dumps({"messages": padded}))) == TALK


def test_overloaded_endpoint_is_retried(settings: synthesize.Config, endpoint: Endpoint) -> None:
    endpoint.answer = lambda seed, attempt: ((408, 429, 500, 502, 503, 200)[attempt], good(), {})
    run(settings, count=4, attempts=6)
    assert seeds(settings) == [0, 1, 2, 3] and len(endpoint.bodies) == 24


def test_backoff_doubles_and_respects_retry_after(settings: synthesize.Config, endpoint: Endpoint) -> None:
    endpoint.answer = lambda seed, attempt: (200 if attempt == 3 else 503, good(), {})
    run(settings, count=1, backoff_seconds=0.1)
    waits = [later - sooner for sooner, later in zip(endpoint.times, endpoint.times[1:])]
    assert all(wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True))
    endpoint.times.clear()
    endpoint.answer = lambda seed, attempt: (429, b"", {"Retry-After": "1"}) if attempt == 0 else (200, good(), {})
    run(settings, seed=1, count=1)
    assert endpoint.times[1] - endpoint.times[0] >= 1


def test_timeout_is_retried_and_requests_are_concurrent(settings: synthesize.Config, endpoint: Endpoint) -> None:
    endpoint.answer = lambda seed, attempt: (200, 60.0 if attempt == 0 else good(), {})
    run(settings, count=4, workers=4, timeout_seconds=2)
    assert seeds(settings) == [0, 1, 2, 3]
    first, *_, last = endpoint.times[:4]
    assert last - first < 1.5 and endpoint.times[-1] - first < 50


def test_failures_are_reported_and_retried_by_the_same_command(settings: synthesize.Config, endpoint: Endpoint) -> None:
    endpoint.answer = lambda seed, attempt: (500 if seed == 2 else 200, completion("?") if seed == 3 else good(), {})
    with pytest.raises(UserError) as caught:
        run(settings, attempts=2)
    for part in ("2 of 12 failed: ", "HTTP 500 (1x)", "the answer is not valid JSON (1x)", "same command retries them"):
        assert part in str(caught.value)
    assert seeds(settings) == [0, 1, *range(4, 12)]
    endpoint.answer = lambda seed, attempt: (200, good(), {})
    endpoint.bodies.clear()
    run(settings)
    assert len(endpoint.bodies) == 2 and seeds(settings) == list(range(12))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the request: HTTP 401 no such key: …; is the key in OPENAI_API_KEY right\?"),
        (403, r"HTTP 403 .*is the key in OPENAI_API_KEY right"),
        (404, r"HTTP 404 .*are base_url and model right"),
        (400, r"10 .* in a row failed.*HTTP 400 no such key: …; if it does not support JSON schemas: .*schema=false"),
    ],
)
def test_refusal_stops_the_run(settings: synthesize.Config, endpoint: Endpoint, status: int, message: str) -> None:
    endpoint.answer = lambda seed, attempt: (status, {"error": {"message": "no such key: sk-secret\nsecond line"}}, {})
    with pytest.raises(UserError, match=message) as caught:
        run(settings, count=1000)
    assert len(endpoint.bodies) <= (20 if status == 400 else 4), "each once"
    assert "sk-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_unreachable_endpoint_stops_the_run(settings: synthesize.Config) -> None:
    with pytest.raises(UserError, match=r"10 conversations in a row failed, the last: cannot connect to http://127"):
        run(settings, base_url="http://127.0.0.1:9/v1", attempts=2, count=1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "set the model's name at the endpoint: --set model="),
        ({"key_variable": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY holds no API key: export NO_SUCH_KEY="),
        ({"facts": Path("/no/such.txt")}, r"facts=/no/such.txt cannot be read: No such file"),
        ({"output": Path("/proc/no/out.jsonl")}, "/proc/no/out.jsonl cannot be written"),
        ({"output": Path("/")}, r"/ cannot be read: Is a directory"),
        ({"count": 0}, "count=0: must be at least 1"),
        ({"timeout_seconds": 0.0}, "timeout_seconds=0.0: must be above 0"),
    ],
)
def test_wrong_settings_fail_before_any_request(
    settings: synthesize.Config, endpoint: Endpoint, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(settings, **changes)
    assert len(endpoint.bodies) == 0


@pytest.mark.slow
def test_ctrl_c_keeps_finished_conversations_and_does_not_wait(settings: synthesize.Config, endpoint: Endpoint) -> None:
    endpoint.answer = lambda seed, attempt: (200, good() if seed < 3 else 60.0, {})
    command = [sys.executable, "launch.py", "--experiment=synthesize", "--set", "model=m", "--set", "workers=3"]
    command += ["--set", f"base_url={settings.base_url}", "--set", f"output={settings.output}"]

    def written() -> int:
        return settings.output.read_bytes().count(b"\n") if settings.output and settings.output.exists() else 0

    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (written() == 3 and len(endpoint.bodies) == 6):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=50)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped by Ctrl-C" in err
    assert seeds(settings) == [0, 1, 2]
