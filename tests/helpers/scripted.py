"""The real server with a scripted model: a test determines the answers, their timing and their failures.

    with scripted.serve({"hello": ["Hi ", "there", "!"]}, delay=0.05) as server:
        httpx.post(server.url + "/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})

`serve` runs `nanochat.serve.app` under uvicorn on a free port of 127.0.0.1 in a thread of this process; only the
workers are scripted.

A piece of an answer is one of
    "text"                      text, as one token; bytes for text that is cut within a character
    ("python", "1+1")           a tool call
    ("output", "2")             its result (forced)
    0.5                         a pause in seconds, on top of `delay`
    scripted.FAIL               the worker exits: the stream ends in an error event, the worker is restarted
    scripted.REFUSE             the worker refuses the request: an error event
    scripted.LENGTH             ends the answer with finish_reason "length" (else it is "stop")
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nanochat import infer
from nanochat.data import Tokenizer
from nanochat.serve import Limits, Scheduler, app, middleware, scheduler, worker

FAIL, REFUSE, LENGTH = object(), object(), object()
Piece = Any
Replies = Mapping[str, Sequence[Piece]] | Callable[[str, infer.Request], Sequence[Piece]]

# One token for each byte; a piece that is longer comes as that many tokens of one step.
TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))


@dataclasses.dataclass
class Server:
    """A running server and what reached its model.

    Attributes:
        requests: (last user message, request) in the order in which answers began. prompts: as text.
        cancelled: messages whose answers were cancelled: grows within a piece of it.
        stop: ends the server as a signal would, and waits for that.
    """

    url: str = ""
    requests: list[tuple[str, infer.Request]] = dataclasses.field(default_factory=list)
    prompts: list[str] = dataclasses.field(default_factory=list)
    cancelled: list[str] = dataclasses.field(default_factory=list)
    scheduler: Scheduler = None  # type: ignore[assignment]
    stop: Callable[[], None] = None  # type: ignore[assignment]
    uvicorn: middleware.Server = None  # type: ignore[assignment]


@contextlib.contextmanager
def serve(
    replies: Replies,
    *,
    delay: float = 0.0,
    load_seconds: float = 0.0,
    slots: int = 8,
    queue_limit: int = 64,
    context: int = 40_000,
    notice: str | None = None,
    workers: int = 1,
    wait: bool = True,
    **limits: Any,
) -> Iterator[Server]:
    """Run the server.

    Args:
        replies: {last user message: pieces}, or a function (message, request) -> pieces. Other messages get the pieces
            of the key "" if there is one, else the echo ["You said: ", message].
        delay: seconds before each piece. load_seconds: until a worker is ready. wait: for all workers to be ready.
        slots: answers at once per worker. notice: as in `WorkerInfo`. limits: fields of `Limits`.
    """
    server = Server()
    info = worker.WorkerInfo("scripted", 1, "base" if notice else "sft", notice, TOKENIZER, context, slots, "cpu", "")

    def connect(deliver: worker.Deliver) -> worker.WorkerHandle:
        return ScriptedWorker(server, replies, delay, load_seconds, info, deliver)

    server.scheduler = scheduler.create([connect] * workers, queue_limit)
    with running(server.scheduler, dataclasses.replace(Limits(port=0), **limits)) as running_server:
        server.url, server.stop, server.uvicorn = running_server
        end = time.monotonic() + 10
        while wait and not all(worker.info for worker in server.scheduler.workers):
            assert time.monotonic() < end, "the scripted workers are not ready"
            time.sleep(0.005)
        yield server


@contextlib.contextmanager
def running(scheduler: Scheduler, limits: Limits) -> Iterator[tuple[str, Callable[[], None], middleware.Server]]:
    """Run a server in a thread; yields its address, what stops it as a signal would, and itself."""
    with middleware.listen(limits) as sock:
        server = middleware.Server(app.create_app(scheduler, limits), scheduler, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"

        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            host = f"[{limits.host}]" if ":" in limits.host else limits.host
            yield f"http://{host}:{sock.getsockname()[1]}", stop, server
        finally:
            stop()


class ScriptedWorker(worker.WorkerHandle):
    """A worker that follows its script in the server's event loop."""

    def __init__(
        self,
        server: Server,
        replies: Replies,
        delay: float,
        load_seconds: float,
        info: worker.WorkerInfo,
        deliver: worker.Deliver,
    ) -> None:
        self._server, self._replies, self._delay, self._deliver = server, replies, delay, deliver
        self._answers: dict[int, tuple[asyncio.Task[None], str]] = {}
        self._loading = asyncio.get_running_loop().call_later(load_seconds, deliver, ("ready", info))

    def send(self, message: worker.Message) -> None:
        if message[0] == "new":
            _, key, request = message
            prompt = TOKENIZER.decode(request.prompt)
            content = prompt.rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
            self._server.requests.append((content, request))
            self._server.prompts.append(prompt)
            self._answers[key] = asyncio.get_running_loop().create_task(self._answer(key, content, request)), content
        elif message[1] in self._answers:
            task, content = self._answers.pop(message[1])
            task.cancel()
            self._server.cancelled.append(content)

    def close(self) -> None:  # called from a thread; the answers end by themselves, ignored
        self._loading.cancel()

    async def _answer(self, key: int, content: str, request: infer.Request) -> None:
        sent, finish = 0, "stop"
        for piece in self._pieces(content, request):
            await asyncio.sleep(self._delay + (piece if isinstance(piece, float) else 0.0))
            if piece is FAIL:
                self._deliver(("failed", "scripted", False))
                self._deliver(("exited",))
                return
            if piece is REFUSE:
                self._deliver(("refused", key, "scripted: refused"))
                return
            if piece is LENGTH:
                finish = "length"
                break
            tokens = [] if isinstance(piece, float) else _tokens(piece)[: request.max_tokens - sent]
            sent += len(tokens)
            if sent >= request.max_tokens:
                finish = "length"
                self._send_tokens(key, tokens[:-1])
                self._deliver(("tokens", [(key, tokens[-1], "length")]))
                self._answers.pop(key, None)
                return
            self._send_tokens(key, tokens)
        self._answers.pop(key, None)
        self._deliver(("tokens", [(key, TOKENIZER.special("<|assistant_end|>"), finish)]))

    def _send_tokens(self, key: int, tokens: list[int]) -> None:
        if tokens:
            self._deliver(("tokens", [(key, token, None) for token in tokens]))

    def _pieces(self, content: str, request: infer.Request) -> Sequence[Piece]:
        if callable(self._replies):
            return self._replies(content, request)
        return self._replies.get(content, self._replies.get("", ["You said: ", content]))


def _tokens(piece: Piece) -> list[int]:
    """Return a piece's tokens, those of a tool call with its markers."""
    if isinstance(piece, tuple):
        kind, text = piece
        return [TOKENIZER.special(f"<|{kind}_start|>"), *text.encode(), TOKENIZER.special(f"<|{kind}_end|>")]
    return list(piece if isinstance(piece, bytes) else piece.encode())
