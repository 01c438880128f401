"""The real server with a scripted model: a test determines the answers, their timing and their failures.

    with scripted.serve({"hello": ["Hi ", "there", "!"]}, delay=0.05) as server:
        httpx.post(server.url + "/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})

A piece of an answer is one of
    "text"                      text, as one token; bytes for text that is cut within a character
    ("python", "1+1")           a tool call
    ("output", "2")             its result (forced)
    0.5                         a pause in seconds, on top of `delay`
    scripted.FAIL               the worker exits: the stream ends in an error event, the worker is restarted
    scripted.REFUSE             the worker refuses the request: an error event
    scripted.LENGTH             ends the answer with finish_reason "length" (else it is "stop")

`python scripted.py '{"hello": ["Hi"]}' GRACE_SECONDS` is the server as a process of its own, for signals.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nanochat import infer
from nanochat.data import Tokenizer
from nanochat.serve import ApiConfig, Limits, Scheduler, app, middleware, scheduler, worker

FAIL, REFUSE, LENGTH = object(), object(), object()
Piece = Any
Replies = Mapping[str, Sequence[Piece]] | Callable[[str, infer.Request], Sequence[Piece]]

# One token for each byte; a piece that is longer comes as that many tokens of one step.
TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))


@dataclasses.dataclass
class Server:
    """A running server and what reached its model."""

    scheduler: Scheduler
    uvicorn: middleware.Server
    url: str
    requests: list[tuple[str, infer.Request]]  # (last user message, request) in the order in which answers began
    cancelled: list[str]  # messages whose answers were cancelled
    stop: Callable[[], None]  # ends the server as a signal would, and waits for that

    @property
    def prompts(self) -> list[str]:
        return [TOKENIZER.decode(request.prompt) for _, request in self.requests]


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
    models: Sequence[str] = ("scripted",),
    wait: bool = True,
    connect: scheduler.Connect | None = None,
    api: ApiConfig = ApiConfig(),
    **limits: Any,
) -> Iterator[Server]:
    """Run the server.

    Args:
        replies: {last user message: pieces}, or a function (message, request) -> pieces. Other messages get the pieces
            of the key "" if there is one, else the echo ["You said: ", message].
        delay: seconds before each piece. load_seconds: until a worker is ready. wait: for all workers to be ready.
        slots: answers at once per worker. notice: as in `WorkerInfo`. limits: fields of `Limits`.
        connect: starts another worker than the scripted one.
    """
    requests, cancelled = [], []
    info = worker.WorkerInfo("", 1, "base" if notice else "sft", notice, TOKENIZER, context, slots, "cpu", "")
    infos = [info._replace(name=name) for name in models]

    def connect_scripted(deliver: worker.Deliver) -> worker.WorkerHandle:
        asyncio.get_running_loop().call_later(load_seconds, deliver, ("ready", *infos))
        return ScriptedWorker(replies, delay, deliver, requests, cancelled)

    connects, limits_ = (
        [connect or connect_scripted] * workers,
        dataclasses.replace(Limits(port=0, grace_seconds=0), **limits),
    )
    scheduler_ = scheduler.create(connects, queue_limit)
    with middleware.listen(limits_) as sock:
        uvicorn = middleware.Server(app.create_app(scheduler_, limits_, api), scheduler_, limits_)
        thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [sock]}, name="server")
        thread.start()

        def stop() -> None:
            uvicorn.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"

        try:
            end = time.monotonic() + 10
            while not uvicorn.started or (wait and not all(worker.info for worker in scheduler_.workers)):
                assert thread.is_alive() and time.monotonic() < end, "the server did not start"
                time.sleep(0.005)
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            yield Server(scheduler_, uvicorn, url, requests, cancelled, stop)
        finally:
            stop()


class ScriptedWorker(worker.WorkerHandle):
    """A worker that follows its script in the server's event loop."""

    def __init__(self, replies: Replies, delay: float, deliver: worker.Deliver, requests, cancelled) -> None:
        self._replies, self._delay, self._deliver = replies, delay, deliver
        self._requests, self._cancelled = requests, cancelled
        self._answers: dict[int, tuple[asyncio.Task[None], str]] = {}

    def send(self, message: worker.Message) -> None:
        if message[0] == "new":
            _, key, request, _ = message
            last = TOKENIZER.decode(request.prompt).rpartition("<|user_start|>")[2]
            content = last.partition("<|user_end|>")[0]
            self._requests.append((content, request))
            self._answers[key] = asyncio.get_running_loop().create_task(self._answer(key, content, request)), content
        else:
            task, content = self._answers[message[1]]
            if task.cancel():
                self._cancelled.append(content)

    def close(self) -> None:  # the answers end by themselves, ignored
        pass

    async def _answer(self, key: int, content: str, request: infer.Request) -> None:
        if callable(self._replies):
            pieces = self._replies(content, request)
        else:
            pieces = self._replies.get(content, self._replies.get("", ["You said: ", content]))
        room, finish = request.max_tokens, "stop"
        for piece in pieces:
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
            if isinstance(piece, float):
                continue
            events: list[Any] = []
            for token in _tokens(piece)[:room]:
                room -= 1
                events.append((key, token, None if room else "length", _logprobs(token, request)))
            self._deliver(("tokens", events))
            if not room:
                return
        self._deliver(("tokens", [(key, TOKENIZER.special("<|assistant_end|>"), finish, None)]))


def _logprobs(token: int, request: infer.Request) -> infer.TokenLogprobs | None:
    """Return made-up log-probabilities, if the request asks for them: the token's, and of the ids after it."""
    if request.logprobs is None:
        return None
    probability = (0.95, 0.6, 0.35, 0.15, 0.02)[token % 5]
    rest = (1 - probability) / 8
    top = [(token, math.log(probability)), *(((token + i) % 256, math.log(rest)) for i in range(1, request.logprobs))]
    top = sorted(top, key=lambda pair: -pair[1])
    return infer.TokenLogprobs(math.log(probability), tuple(top[: request.logprobs]))


def _tokens(piece: Piece) -> list[int]:
    """Return a piece's tokens, those of a tool call with its markers."""
    if isinstance(piece, tuple):
        kind, text = piece
        return [TOKENIZER.special(f"<|{kind}_start|>"), *text.encode(), TOKENIZER.special(f"<|{kind}_end|>")]
    return list(piece if isinstance(piece, bytes) else piece.encode())


def main() -> None:
    """Serve until a signal; prints the port."""
    info = worker.WorkerInfo("scripted", 1, "sft", None, TOKENIZER, 40_000, 64, "cpu", "")
    limits = Limits(port=0, grace_seconds=float(sys.argv[2]))

    def connect(deliver: worker.Deliver) -> worker.WorkerHandle:
        deliver(("ready", info))
        return ScriptedWorker(json.loads(sys.argv[1]), 0.0, deliver, [], [])

    scheduler_ = scheduler.create([connect], 64)
    middleware.run(app.create_app(scheduler_, limits), scheduler_, limits, lambda port: print(port, flush=True))


if __name__ == "__main__":
    main()
