"""The real server with a scripted model: answers, their pace and their failures are what a test says.

    with scripted.serve({"hello": ["Hi ", "there", "!"]}, delay=0.05) as server:
        httpx.post(server.url + "/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})

`serve` runs `nanochat.serve.app` under uvicorn on a free port of 127.0.0.1 in a thread of this process; only the
replica is not real. Routes, limits, queue, streaming, OpenAI's protocol, page and headers are those of the web
experiment.

Arguments of `serve`
    replies   {last user message: pieces}, or a function (message, sampling) -> pieces. A message that is no key gets
              the pieces of the key "" if there is one, else the echo ["You said: ", message].
    delay     seconds before each piece. load_seconds: until the replica says that it is ready.
    slots     answers at once. queue_limit: how many may wait (0: the next one gets 503). context: tokens.
    notice    the line about a base model, as /health gives it (None: none).
    replicas  number of replicas ("gpu" 0, 1, …).
    limits    further fields of `web_guard.Limits`: token="secret", body_seconds=1, connections=10 …

A piece is one of
    "text"                      text, as one token
    ("python", "1+1")           what a tool is asked
    ("output", "2")             what it answers (forced)
    0.5                         a pause in seconds, on top of `delay`
    scripted.FAIL               the replica dies here: the stream ends in an error event, the replica is started again
    scripted.REFUSE             the replica refuses the request: an error event
    scripted.LENGTH             ends the answer with finish_reason "length" (else it is "stop")
Text may be anything: HTML, emoji, a text cut within a character (give bytes: b"\\xf0\\x9f").

The value that is yielded has
    url       e.g. http://127.0.0.1:41235
    asked     [(last user message, Sampling)] in the order in which answers began
    prompts   the whole prompts as text, special tokens spelt out
    cancelled messages whose answers were cancelled (a client left, stop was pressed): grows within a piece of it
    pool      the server's `nanochat.pool.Pool`
    stop()    ends the server as a signal would, and waits for that
    uvicorn   the `web_guard.Server`
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nanochat.data import Tokenizer
from nanochat.serve import Limits, Sampling, Scheduler, middleware, scheduler
from nanochat.serve import app as servers
from nanochat.serve import worker as replica

FAIL, REFUSE, LENGTH = object(), object(), object()
Piece = Any
Replies = Mapping[str, Sequence[Piece]] | Callable[[str, Sampling], Sequence[Piece]]

# One token for each byte; a piece that is longer comes as that many tokens of one step.
TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))


@dataclasses.dataclass
class Server:
    """See the top of the file."""

    url: str = ""
    asked: list[tuple[str, Sampling]] = dataclasses.field(default_factory=list)
    prompts: list[str] = dataclasses.field(default_factory=list)
    cancelled: list[str] = dataclasses.field(default_factory=list)
    pool: Scheduler = None  # type: ignore[assignment]
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
    replicas: int = 1,
    wait: bool = True,
    **limits: Any,
) -> Iterator[Server]:
    """Run the server; see the top of the file. `wait=False`: do not wait until the replicas are ready."""
    server = Server()
    info = replica.Info("scripted", 1, "base" if notice else "sft", notice, TOKENIZER, context, slots, "cpu", "")

    def connect(deliver: Callable[[replica.Message], None]) -> replica.WorkerHandle:
        return _Link(server, replies, delay, load_seconds, info, deliver)

    server.pool = scheduler.create([connect] * replicas, queue_limit)
    with running(server.pool, dataclasses.replace(Limits(port=0), **limits)) as found:
        server.url, server.stop, server.uvicorn = found
        end = time.monotonic() + 10
        while wait and not all(worker.info for worker in server.pool.workers):
            assert time.monotonic() < end, "the scripted replicas are not ready"
            time.sleep(0.005)
        yield server


@contextlib.contextmanager
def running(pool_: Scheduler, limits: Limits) -> Iterator[tuple[str, Callable[[], None], middleware.Server]]:
    """Run the server for any pool in a thread; yields its address, what stops it as a signal would, and itself."""
    with middleware.listen(limits) as sock:
        server = middleware.Server(servers.app(pool_, limits), pool_, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not end"

        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            host = f"[{limits.host}]" if ":" in limits.host else limits.host
            yield f"http://{host}:{sock.getsockname()[1]}", stop, server
        finally:
            stop()


class _Link:
    """A replica that plays its script in the server's event loop."""

    def __init__(
        self,
        server: Server,
        replies: Replies,
        delay: float,
        load_seconds: float,
        info: replica.Info,
        deliver: Callable[[replica.Message], None],
    ) -> None:
        self._server, self._replies, self._delay, self._deliver = server, replies, delay, deliver
        self._plays: dict[int, tuple[asyncio.Task[None], str]] = {}
        self._loading = asyncio.get_running_loop().call_later(load_seconds, deliver, ("ready", info))

    def send(self, message: replica.Message) -> None:
        if message[0] == "new":
            _, key, prompt, sampling = message
            text = TOKENIZER.decode(prompt)
            asked = text.rpartition("<|user_start|>")[2].partition("<|user_end|>")[0]
            self._server.asked.append((asked, sampling))
            self._server.prompts.append(text)
            self._plays[key] = asyncio.get_running_loop().create_task(self._play(key, asked, sampling)), asked
        elif message[1] in self._plays:
            task, asked = self._plays.pop(message[1])
            task.cancel()
            self._server.cancelled.append(asked)

    def close(self) -> None:  # called from a thread; the plays end by themselves, unheard
        self._loading.cancel()

    async def _play(self, key: int, asked: str, sampling: Sampling) -> None:
        told, finish = 0, "stop"
        for piece in self._pieces(asked, sampling):
            await asyncio.sleep(self._delay + (piece if isinstance(piece, float) else 0.0))
            if piece is FAIL:
                self._deliver(("failed", "scripted", False))
                self._deliver(("gone",))
                return
            if piece is REFUSE:
                self._deliver(("refused", key, "scripted: refused"))
                return
            if piece is LENGTH:
                finish = "length"
                break
            tokens = [] if isinstance(piece, float) else _tokens(piece)[: sampling.max_tokens - told]
            told += len(tokens)
            if told >= sampling.max_tokens:
                finish = "length"
                self._tell(key, tokens[:-1])
                self._deliver(("tokens", [(key, tokens[-1], "length")]))
                self._plays.pop(key, None)
                return
            self._tell(key, tokens)
        self._plays.pop(key, None)
        self._deliver(("tokens", [(key, TOKENIZER.special("<|assistant_end|>"), finish)]))

    def _tell(self, key: int, tokens: list[int]) -> None:
        if tokens:
            self._deliver(("tokens", [(key, token, None) for token in tokens]))

    def _pieces(self, asked: str, sampling: Sampling) -> Sequence[Piece]:
        if callable(self._replies):
            return self._replies(asked, sampling)
        return self._replies.get(asked, self._replies.get("", ["You said: ", asked]))


def _tokens(piece: Piece) -> list[int]:
    """Return a piece's tokens, a tool's with its markers."""
    if isinstance(piece, tuple):
        kind, text = piece
        return [TOKENIZER.special(f"<|{kind}_start|>"), *text.encode(), TOKENIZER.special(f"<|{kind}_end|>")]
    return list(piece if isinstance(piece, bytes) else piece.encode())
