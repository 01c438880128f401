"""The web server as clients see it, with a scripted model (tests/helpers/scripted.py)."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import scripted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import infer
from nanochat.config import UserError
from nanochat.data import chat_format
from nanochat.data.chat_format import Piece
from nanochat.serve import Limits, app, middleware, scheduler, schema
from nanochat.serve.api import answers

REPLIES = {
    "hello": ["Hi ", "there", "!"],
    "tool": ["It is ", ("python", "1+1"), ("output", "2"), "2."],
    "cut": [b"\xf0\x9f", b"\x98\x80", b" and ", b"\xe2\x82"],
    "long": ["x"] * 2000,
    "slow": [0.3, "a", 60.0, "b"],
    "die": ["some", scripted.FAIL],
    "refuse": [scripted.REFUSE],
    "stops": ["one S", "TO", "P two"],
}


@pytest.fixture(scope="module")
def server() -> Iterator[scripted.Server]:
    with scripted.serve(REPLIES) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: scripted.Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def body(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


HTTP = httpx.Client(timeout=60)  # making one takes longer than most requests


def post(server: scripted.Server, content: str, path: str = "/chat/completions", **more: Any) -> httpx.Response:
    return HTTP.post(server.url + path, json=body(content, **more))


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    detail = response.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"} and detail["message"]
    return detail


def wait_for(true: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.005)


def idle(server: scripted.Server) -> bool:
    return server.scheduler.active == 0 and not server.scheduler.queue


# Native dialect


def test_native_stream_has_token_events_and_a_done_event(server: scripted.Server) -> None:
    got = events(post(server, "tool"))
    assert got == [
        {"token": "It is ", "gpu": 0},
        {"token": "1+1", "gpu": 0, "kind": "python"},
        {"token": "2", "gpu": 0, "kind": "output"},
        {"token": "2.", "gpu": 0},
        {"done": True, "finish_reason": "stop"},
    ]


def test_tokens_are_sent_as_they_are_generated() -> None:
    with (
        scripted.serve(lambda *_: ["a", 0.5, "b"]) as server,
        HTTP.stream("POST", server.url + "/chat/completions", json=body("x")) as response,
    ):
        received = [(time.monotonic(), chunk) for chunk in response.iter_text() if "token" in chunk]
    assert received[-1][0] - received[0][0] > 0.4


def test_multibyte_characters_are_not_split(server: scripted.Server) -> None:
    got = [event["token"] for event in events(post(server, "cut"))[:-1]]
    assert "".join(got) == "😀 and \ufffd"
    assert not any("\ufffd" in text for text in got[:-1])


def test_prompt_and_sampling_parameters_reach_the_model(server: scripted.Server) -> None:
    post(server, "hello", temperature=0, top_k=0, max_tokens=2, seed=7)
    content, request = server.requests[-1]
    assert content == "hello" and request == infer.Request(request.prompt, 2, 0.0, 0, 7)
    assert events(post(server, "hello", max_tokens=2))[-1] == {"done": True, "finish_reason": "length"}
    post(server, "hello")
    assert server.requests[-2][1].seed != server.requests[-1][1].seed, "the default is random"
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "hello")]
    messages = [{"role": role, "content": text} for role, text in turns]
    HTTP.post(server.url + "/chat/completions", json={"messages": messages})
    assert server.prompts[-1] == (
        "<|bos|><|user_start|>S\n\na<|user_end|><|assistant_start|>b<|assistant_end|><|user_start|>hello<|user_end|>"
        "<|assistant_start|>"
    )
    detail = error(HTTP.post(server.url + "/chat/completions", json={"messages": messages[:3]}), 400)
    assert "message 3: the last message must be the user's" in detail["message"] and detail["param"] == "messages"


@pytest.mark.parametrize(
    "turns",
    [
        [("developer", "S"), ("user", "hello")],
        [("system", "S"), ("user", "a"), ("user", "b"), ("user", "hello")],
        [("user", "hello"), ("assistant", ""), ("assistant", "b"), ("system", ""), ("user", "hello")],
        [("user", "hello"), ("system", "S")],
    ],
)
def test_prompt_is_the_one_of_training(server: scripted.Server, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    sent = [message | {"type": "text"} for message in messages]
    assert HTTP.post(server.url + "/v1/chat/completions", json={"messages": sent}).status_code == 200
    assert server.requests[-1][1].prompt == tuple(chat_format.prompt(scripted.TOKENIZER, messages))


def test_prompt_beyond_the_context_is_refused() -> None:
    with scripted.serve(REPLIES, context=20) as server:
        assert len(events(post(server, "x" * 15))) > 1  # 15 and four markers leave one token
        detail = error(post(server, "x" * 16), 400)
        assert detail["code"] == "context_length_exceeded" and "at most 19" in detail["message"]


def test_all_errors_have_openai_shape(server: scripted.Server) -> None:
    with httpx.Client(base_url=server.url) as http:
        url, json_type = "/chat/completions", {"content-type": "application/json"}
        for path in ("/nothing", "/%00", "/v1/%2e%2e/etc/passwd"):
            error(http.get(path), 404)
        assert error(http.get(url), 405) and "POST" in http.get(url).headers["allow"]
        assert http.head("/health").status_code == http.head("/metrics").status_code == 200
        error(http.post(url, content=b"{}", headers={"content-type": "text/plain"}), 415)
        error(http.post(url, content=b"{}"), 415)
        error(http.post(url, content=b"{", headers=json_type), 400)
        error(http.post(url, json=body("x", temperature=3)), 400)


def test_refusal_and_worker_exit_end_the_stream_with_an_error() -> None:
    with scripted.serve(REPLIES, workers=2) as server:
        assert "refused" in events(post(server, "refuse"))[-1]["error"]["message"]
        got = events(post(server, "die"))
        assert got[0]["token"] == "some" and "try again" in got[-1]["error"]["message"]
        wait_for(lambda: not all(w.info for w in server.scheduler.workers))
        assert events(post(server, "hello"))[0]["gpu"] == 1, "the other worker keeps running"
        health = HTTP.get(server.url + "/health").json()
        assert health["ready"] and [worker["ready"] for worker in health["workers"]] == [False, True]
        wait_for(lambda: all(worker.info for worker in server.scheduler.workers))
        stats = HTTP.get(server.url + "/stats").json()
        assert [worker["restarts"] for worker in stats["workers"]] == [1, 0]
        assert idle(server)


def test_requests_get_503_while_loading_and_wait_during_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RESTART_SECONDS", (0.3, 1.0))
    with scripted.serve(REPLIES, load_seconds=0.5, wait=False) as server:
        assert HTTP.get(server.url + "/health").json()["status"] == "loading"
        response = post(server, "hello")
        assert error(response, 503)["type"] == "overloaded_error" and int(response.headers["retry-after"]) > 0
        assert HTTP.get(server.url + "/v1/models").json()["data"] == []
        wait_for(lambda: server.scheduler.ready)
        assert "error" in events(post(server, "die"))[-1]
        wait_for(lambda: not server.scheduler.ready)
        assert HTTP.get(server.url + "/health").json()["status"] == "restarting"
        assert events(post(server, "hello"))[-1]["done"], "it waited for the restart"


@pytest.mark.slow
def test_hung_worker_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "HANG_SECONDS", 0.4)
    monkeypatch.setattr(scheduler, "RESTART_SECONDS", (0.2, 1.0))
    with scripted.serve({"hang": ["a", 60.0], "slow": ["a", 0.25, "b", 0.25, "c"], "late": [0.25, "a"]}) as server:
        assert events(post(server, "slow"))[-1]["done"]
        time.sleep(0.5)  # silent because idle: the time starts again with the next request
        assert events(post(server, "late"))[-1]["done"]
        assert "try again" in events(post(server, "hang"))[-1]["error"]["message"]
        assert "hung" in HTTP.get(server.url + "/stats").json()["workers"][0]["error"]
        wait_for(lambda: server.scheduler.ready)
        assert events(post(server, "slow"))[-1]["done"]
        assert [worker.restarts for worker in server.scheduler.workers] == [1]


@pytest.mark.slow
def test_full_queue_returns_503_with_retry_after() -> None:
    with scripted.serve({"": ["a", 0.6, "b"]}, slots=1, queue_limit=1) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            response = stack.enter_context(HTTP.stream("POST", server.url + "/chat/completions", json=body("x")))
            assert response.status_code == 200
        refused = post(server, "x")
        assert error(refused, 503)["message"].startswith("1 requests are waiting")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        error(post(server, "x", "/v1/chat/completions", n=2), 503)
        assert len(server.scheduler.queue) == 1, "a refused request leaves nothing behind"
    with scripted.serve(REPLIES, slots=2, queue_limit=0) as server:
        assert post(server, "hello").is_success, "free slots need no queue"
        error(post(server, "hello", "/v1/chat/completions", n=3), 503)


# Clients that disconnect


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_slot(path: str, stream: bool) -> None:
    more = {"stream": stream} if path.startswith("/v1") else {}
    with scripted.serve({"": ["x"] * 1000}, delay=0.02, slots=1) as server:
        for waiting in (False, True):  # the second time as one that still waits for the slot
            with contextlib.ExitStack() as stack:
                if waiting:
                    stack.enter_context(HTTP.stream("POST", server.url + "/chat/completions", json=body("first")))
                connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
                connection.request("POST", path, json.dumps(body("gone", **more)), {"content-type": "application/json"})
                wait_for(lambda: len(server.scheduler.queue) == 1 if waiting else server.scheduler.active == 1)  # noqa: B023
                connection.sock.close()
                left = time.monotonic()
                wait_for(lambda: not server.scheduler.queue and server.scheduler.active == int(waiting))  # noqa: B023
                assert time.monotonic() - left < 10  # of 20, on a busy machine too
        wait_for(lambda: idle(server))
        assert server.cancelled == ["gone", "first"]


def test_shutdown_ends_streams_with_an_error() -> None:
    with scripted.serve(REPLIES) as server:
        ended = threading.Event()
        with HTTP.stream("POST", server.url + "/chat/completions", json=body("slow")) as response:
            lines = response.iter_lines()
            assert "token" in next(line for line in lines if line.startswith("data"))

            def stop() -> None:
                server.stop()
                ended.set()

            threading.Thread(target=stop).start()
            rest = [line for line in lines if line.startswith("data")]
        assert "shutting down" in rest[-1]
        assert ended.wait(5)


# OpenAI's dialect


def create(client: openai.OpenAI, content: str = "hello", model: str = "scripted", **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": model, "messages": messages} | more)


def streamed_text(chunks: Iterable[Any], index: int = 0) -> str:
    choices = [chunk.choices[0] for chunk in chunks]
    return "".join(choice.delta.content or "" for choice in choices if choice.index == index)


def test_openai_completion(client: openai.OpenAI, server: scripted.Server) -> None:
    assert [model.id for model in client.models.list()] == ["scripted"]
    got = create(client, seed=3, max_completion_tokens=100)
    assert got.choices[0].message.content == "Hi there!" and got.choices[0].finish_reason == "stop"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (9, 10)
    assert server.requests[-1][1].max_tokens == 100
    for model in ("nanochat", "scripted"):
        got = create(client, model=model, max_tokens=2)
        assert (got.choices[0].message.content, got.choices[0].finish_reason, got.model) == ("Hi", "length", "scripted")


@pytest.mark.parametrize("include_usage", [False, True])
def test_openai_stream_bytes(server: scripted.Server, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    response = post(server, "hello", "/v1/chat/completions", stream=True, max_tokens=1, **options)
    first = json.loads(response.text.split("\n")[0].removeprefix("data: "))
    head = (
        f'data: {{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},"model":"scripted"'
    )
    usage = ',"usage":null' if include_usage else ""
    choices = [('{"role":"assistant","content":""}', "null"), ('{"content":"H"}', "null"), ("{}", '"length"')]
    expected = [
        f'{head},"choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}]{usage}}}\n\n'
        for delta, finish in choices
    ]
    if include_usage:
        usage = '{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}'
        expected.append(f'{head},"choices":[],"usage":{usage}}}\n\n')
    assert response.text == "".join([*expected, "data: [DONE]\n\n"])


def test_openai_n_choices(client: openai.OpenAI, server: scripted.Server) -> None:
    del server.requests[:]
    got = create(client, n=3, seed=2**63 - 1)
    assert [choice.message.content for choice in got.choices] == ["Hi there!"] * 3
    assert got.usage.completion_tokens == 30
    assert [request.seed for _, request in server.requests] == [2**63 - 1, 0, 1]
    chunks = list(create(client, n=2, stream=True))
    assert [streamed_text(chunks, index) for index in (0, 1)] == ["Hi there!"] * 2


def test_openai_stop_sequences(client: openai.OpenAI, server: scripted.Server) -> None:
    got = create(client, "stops", stop=["never", "STOP"])
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == ("one ", "stop")
    assert streamed_text(create(client, "stops", stop="two", stream=True)) == "one STOP "
    wait_for(lambda: idle(server))


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.randoms())
def test_stop_sequence_ends_the_answer_however_it_is_split(text: str, stops: list[str], random: Any) -> None:
    cuts = sorted(random.randint(0, len(text)) for _ in range(random.randint(0, 6)))
    stop_filter = answers.StopSequenceFilter(stops)
    pieces = [Piece("text", text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)])]
    sent = "".join(piece.text for piece in [*stop_filter.feed(pieces), *stop_filter.close()])
    assert stop_filter.stopped == any(stop in text for stop in stops)
    assert text.startswith(sent)
    if stop_filter.stopped:
        assert not any(stop in sent for stop in stops)
        assert any(text[len(sent) :].startswith(stop) for stop in stops)
    else:
        assert sent == text


def test_stop_filter_holds_back_only_possible_prefixes() -> None:
    stop_filter = answers.StopSequenceFilter(["END"])
    assert stop_filter.feed([Piece("text", "a E")]) == [Piece("text", "a ")]
    assert stop_filter.feed([Piece("text", "N")]) == []
    assert stop_filter.feed([Piece("text", "x")]) == [Piece("text", "ENx")]
    pieces = [Piece("text", "E"), Piece("python", "END")]
    assert stop_filter.feed(pieces) == pieces and not stop_filter.stopped
    assert stop_filter.feed([Piece("text", "yEND"), Piece("text", "z")]) == [Piece("text", "y")] and stop_filter.stopped


def test_openai_tool_calls_are_separate_and_can_be_sent_back(client: openai.OpenAI, server: scripted.Server) -> None:
    message = create(client, "tool").choices[0].message
    assert message.content == "It is 2."
    create(client, messages=[{"role": "user", "content": "tool"}, message, {"role": "user", "content": "hello"}])
    called = "It is <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>2.<|assistant_end|>"
    assert called in server.prompts[-1]
    extra = [(c.choices[0].delta.model_extra or {}).get("nanochat_parts") for c in create(client, "tool", stream=True)]
    assert [part for parts in extra if parts for part in parts] == [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]


def test_openai_client_raises_its_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        create(client, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError, match="this server has scripted"):
        create(client, model="gpt-4")
    with pytest.raises(openai.InternalServerError, match="refused"):
        create(client, "refuse")
    with pytest.raises(openai.APIError, match="refused"):
        list(create(client, "refuse", stream=True))


# Access


def test_token_protects_all_but_page_and_health() -> None:
    with scripted.serve(REPLIES, token="secret") as server, httpx.Client(base_url=server.url) as http:
        for path in ("/", "/health", "/static/page.js", "/static/page.css"):
            assert http.get(path).status_code == 200
        for path in ("/static/../stats", "/static/nothing"):
            assert http.get(path).status_code in (401, 404)
        for path in ("/page", "/stats", "/metrics", "/v1/models", "/openapi.json", "/nothing"):
            refused = http.get(path)
            assert error(refused, 401)["type"] == "authentication_error"
            assert refused.headers["www-authenticate"] == "Bearer"
        for value in ("secret", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer sécret"):
            headers = {b"authorization": value.encode("latin-1")}
            error(http.post("/chat/completions", json=body("hello"), headers=headers), 401)
        for value in ("Bearer secret", "bearer  secret"):
            assert http.post("/chat/completions", json=body("hello"), headers={"authorization": value}).is_success
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret").models.list().data


def test_other_origins_and_rebound_hosts_are_refused(server: scripted.Server) -> None:
    port = urlsplit(server.url).port
    with httpx.Client(base_url=server.url) as http:

        def status(**headers: str) -> int:
            return http.post("/chat/completions", json=body("hello"), headers=headers).status_code

        assert status(host=f"localhost:{port}", origin=f"http://localhost:{port}") == 200
        assert status(host=f"[::1]:{port}") == 200
        for origin in (
            "https://evil.example",
            "null",
            f"http://localhost:{port}",
            f"http://127.0.0.1:{port}.evil.example",
        ):
            assert status(origin=origin) == 403, origin
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[", "::1"):
            assert status(host=host) == 403, host
        assert http.options("/chat/completions", headers={"origin": "https://evil.example"}).status_code == 403
        for path in ("/", "/health", "/stats"):
            assert "access-control-allow-origin" not in http.get(path).headers


def test_hosts_setting_allows_the_name_of_a_proxy() -> None:
    with scripted.serve(REPLIES, hosts=("chat.example",)) as server:
        headers = {"host": "chat.example", "origin": "https://chat.example"}
        assert HTTP.post(server.url + "/chat/completions", json=body("hello"), headers=headers).is_success


def test_page_policy_allows_no_external_resource(server: scripted.Server) -> None:
    response = HTTP.get(server.url + "/")
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"] == "'self'" and "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


# Slow, large and broken requests


def raw(server: scripted.Server, *parts: bytes, pause: float = 0.0, seconds: float = 60.0) -> bytes:
    """Send parts with a pause after each, return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=seconds) as sock:
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            for part in parts:
                sock.sendall(part)
                time.sleep(pause)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := sock.recv(65536):
                received += chunk
        return received


HEAD = b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_large_bodies_are_refused(server: scripted.Server) -> None:
    large = b"x" * (schema.MAX_BODY_BYTES + 1)
    assert b" 413 " in raw(server, HEAD + b"Content-Length: 9999999999\r\n\r\n").split(b"\r\n")[0]
    assert b" 413 " in raw(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(large), large).split(b"\r\n")[0]
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large)
    assert b" 413 " in raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunked).split(b"\r\n")[0]
    assert idle(server)


@pytest.mark.slow
def test_slow_clients_are_timed_out() -> None:
    with scripted.serve(REPLIES, header_seconds=0.3, body_seconds=0.3, idle_seconds=1) as server:
        for sent, expected in {
            b"": b"",  # connected, and silent
            b"POST /chat": b"",
            HEAD: b"",  # the header does not end
            HEAD + b"Content-Length: 10\r\n\r\n{": b" 408 ",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n": b" 408 ",
        }.items():
            start = time.monotonic()
            got = raw(server, sent)
            assert expected in got.split(b"\r\n")[0] and bool(got) == bool(expected), sent
            assert time.monotonic() - start < 20  # of 30, on a busy machine too
        # a byte now and then gains nothing
        start = time.monotonic()
        raw(server, *[bytes([byte]) for byte in HEAD], pause=0.02)
        assert time.monotonic() - start < 20
        got = raw(server, HEAD + b"Content-Length: 500\r\n\r\n", *[b" "] * 100, pause=0.02)
        assert b" 408 " in got.split(b"\r\n")[0]
        # nor does what comes after a whole request
        got = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /hea")
        assert got.startswith(b"HTTP/1.1 200")
        wait_for(lambda: not connections(server))


def connections(server: scripted.Server) -> int:
    return len(server.uvicorn.server_state.connections)


@pytest.mark.parametrize("is_stopping", [False, True])
def test_client_that_does_not_read_is_disconnected(is_stopping: bool, caplog: pytest.LogCaptureFixture) -> None:
    # Each token comes by itself, and its event has 40 bytes: in all more than the buffers between server and client.
    limits: dict[str, Any] = {"send_seconds": 30.0, "grace_seconds": 0.2} if is_stopping else {"send_seconds": 0.5}
    with scripted.serve({"": ["x"] * 4096}, **limits) as server, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", urlsplit(server.url).port or 0))
        content = json.dumps(body("x", max_tokens=4096, n=8, stream=True)).encode()
        head = HEAD.replace(b"/chat", b"/v1/chat")
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        wait_for(lambda: server.requests)
        wait_for(lambda: idle(server))
        start = time.monotonic()
        if is_stopping:
            server.stop()
        wait_for(lambda: not connections(server))
        assert time.monotonic() - start < 20  # of 30, on a busy machine too
    assert not any(record.exc_info for record in caplog.records)


def test_too_many_connections_get_503() -> None:
    with scripted.serve(REPLIES, connections=3) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0)))
            wait_for(lambda: connections(server) == 3)
            got = raw(server)
            assert got.startswith(b"HTTP/1.1 503") and b"too many connections" in got and b"retry-after" in got
        wait_for(lambda: not connections(server))
        assert HTTP.get(server.url + "/health").is_success


def test_broken_http_is_refused_in_json(server: scripted.Server) -> None:
    for sent in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    ):
        head, _, content = raw(server, sent).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400"), sent
        assert json.loads(content)["error"]["type"] == "invalid_request_error"


BROKEN_BODIES = {
    "chunk size": b"zz\r\nabc\r\n0\r\n\r\n",
    "chunk end": b"3\r\nabcdef\r\n0\r\n\r\n",
    "second chunk": b"3\r\nabc\r\n-5\r\n\r\n",
    "trailer": b"0\r\n\x00bad\r\n\r\n",
    "chunk extension": b"3;" + b"e" * 200_000 + b"\r\nabc\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("body", BROKEN_BODIES.values(), ids=BROKEN_BODIES.keys())
@pytest.mark.parametrize(
    "start", ["GET /", "HEAD /health", "GET /metrics", "POST /nothing", "DELETE /health", "POST /chat/completions"]
)
@pytest.mark.parametrize("host", ["localhost", "evil.example"])
def test_broken_chunked_body_is_a_400_without_traceback(
    server: scripted.Server, caplog: pytest.LogCaptureFixture, start: str, body: bytes, host: str
) -> None:
    head = f"{start} HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    head, _, content = raw(server, head.encode() + body).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head
    assert bool(content) == (not start.startswith("HEAD"))
    assert not caplog.records and idle(server)


# Metrics and logs


def test_stats_and_metrics_count() -> None:
    with scripted.serve(REPLIES, notice="a base model", slots=2) as server, httpx.Client(base_url=server.url) as http:
        events(post(server, "hello"))
        error(post(server, "hello", temperature=9), 400)
        assert http.get("/health").json()["notice"] == "a base model"
        stats = http.get("/stats").json()
        assert stats["model"] == {"name": "scripted", "step": 1, "stage": "base", "context": 40_000}
        assert stats["answers"] == {"stop": 1} and stats["tokens"] == 10 and stats["queue"]["length"] == 0
        assert stats["workers"][0]["slots"] == 2
        lines = http.get("/metrics").text.splitlines()
        assert 'nanochat_answers_total{finish="stop"} 1.0' in lines and "nanochat_tokens_total 10.0" in lines
        assert 'nanochat_responses_total{code="400"} 1.0' in lines and "nanochat_ready 1.0" in lines
        assert "nanochat_first_token_seconds_count 1.0" in lines
        assert all(line.startswith("#") or float(line.rpartition(" ")[2]) >= 0 for line in lines)


def test_conversations_are_not_logged(capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    with scripted.serve(REPLIES, workers=2) as server:
        for content in ("hello", "die", "refuse"):
            post(server, content + " xyzzy" if content == "hello" else content)
        post(server, "xyzzy", temperature=9)
        HTTP.get(server.url + "/xyzzy")
    out, err = capfd.readouterr()
    assert "xyzzy" not in out + err + caplog.text.replace("/xyzzy", "")


# Fuzzing


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": JSON})
# Wrong in many ways, and at times right
BODIES = st.builds(
    lambda fields, messages: {"messages": messages} | fields,
    st.dictionaries(st.sampled_from([*schema.CompletionRequest.model_fields]) | st.text(max_size=5), JSON, max_size=4),
    st.lists(MESSAGE, max_size=3) | JSON | st.just(body("hello")["messages"]),
)


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=BODIES, garbage=st.tuples(st.integers(0, 50), st.binary(max_size=3)) | st.none())
@pytest.mark.slow
def test_random_requests_never_return_500(server: scripted.Server, path: str, value: Any, garbage: Any) -> None:
    content = json.dumps(value).encode()
    if garbage:
        content = content[: garbage[0]] + garbage[1] + content[garbage[0] :]
    response = HTTP.post(server.url + path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (response.status_code, content)
    if response.status_code != 200:
        error(response, response.status_code)


# Start and end


def test_port_in_use_is_a_user_error(server: scripted.Server) -> None:
    with pytest.raises(UserError, match=r"could not listen there .*--set port"):
        middleware.listen(Limits(port=urlsplit(server.url).port or 0))
    with pytest.raises(UserError, match="could not listen there"):
        middleware.listen(Limits(host="no.such.host.invalid"))


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("a.b", False)]
)
def test_local_addresses(host: str, local: bool) -> None:
    assert Limits(host).is_local == local


def test_fatal_worker_error_ends_the_server() -> None:
    def connect(deliver: Callable[[Any], None]) -> Any:
        deliver(("failed", "run=x: no such run", True))
        deliver(("exited",))
        return type("Link", (), {"send": lambda *_: None, "close": lambda *_: None})()

    scheduler_, limits = scheduler.create([connect], 1), Limits(port=0)
    with pytest.raises(UserError, match="run=x: no such run"):
        middleware.run(app.create_app(scheduler_, limits), scheduler_, limits)


def test_long_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEEP_ALIVE_SECONDS", 0.05)
    with scripted.serve({"": [0.3, "a"]}) as server:
        assert post(server, "x").text.count(": waiting\n\n") >= 3
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            assert streamed_text(create(client, "x", stream=True)) == "a"
