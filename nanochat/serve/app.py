"""The web server: routes, streams, and what keeps it standing when clients are slow, many, rude or gone.

This process holds no model: it checks requests, queues them (`nanochat.pool`) and turns tokens into text, so /health
answers at once whatever the replicas do. Conversations are kept only while they are answered, and logged nowhere.
"""

import asyncio
import contextlib
import dataclasses
import importlib.resources
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanochat.data import chat_format
from nanochat.serve import middleware, scheduler, schema
from nanochat.serve.middleware import Limits
from nanochat.serve.scheduler import Scheduler, Stream
from nanochat.serve.schema import ApiError, Chat, Delta, Header

MODEL_ALIAS = "nanochat"  # a name that every model answers to
SILENCE_SECONDS = 15.0  # in a stream, after which a comment says that the connection lives
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}

log = logging.getLogger("nanochat.serve.app")


@dataclasses.dataclass(frozen=True)
class Front:
    """What the routes share."""

    pool: Scheduler
    limits: Limits
    started: float = dataclasses.field(default_factory=time.time)


class Update(NamedTuple):
    """What is new of the `index`-th answer of a request; `finish` or `error` on its last."""

    index: int
    pieces: list[Delta]
    finish: str | None
    error: str | None


def app(pool_: Scheduler, limits: Limits) -> Starlette:
    """Return the application; its replicas start and end with it."""
    front = Front(pool_, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        scheduler.open(pool_)
        yield
        await scheduler.close(pool_)

    def route(path: str, method: str, endpoint: Callable[[Front, Request], Awaitable[Response]]) -> Route:
        async def called(request: Request) -> Response:
            return await endpoint(front, request)

        return Route(path, called, methods=[method])

    html, policy = middleware.page(importlib.resources.files("nanochat.serve").joinpath("ui.html").read_text("utf-8"))

    async def page(_: Front, __: Request) -> Response:
        return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    return Starlette(
        routes=[
            route("/", "GET", page),
            route("/health", "GET", health),
            route("/stats", "GET", stats),
            route("/metrics", "GET", metrics),
            route("/openapi.json", "GET", describe),
            route("/chat/completions", "POST", chat),
            route("/v1/chat/completions", "POST", completion),
            route("/v1/models", "GET", models),
        ],
        middleware=[Middleware(middleware.SecurityMiddleware, limits=limits, counters=pool_.counters)],
        exception_handlers={ApiError: _refused, HTTPException: _no_route},
        lifespan=lifespan,
    )


# What the server says of itself


async def health(front: Front, _: Request) -> Response:
    """Return whether the server can answer; open to everyone."""
    info = front.pool.info
    status = "ok" if front.pool.ready else "restarting" if info else "loading"
    workers = [{"gpu": i, "ready": bool(worker.info)} for i, worker in enumerate(front.pool.workers)]
    notice = info.notice if info else None
    return JSONResponse({"status": status, "ready": front.pool.ready, "workers": workers, "notice": notice})


async def stats(front: Front, _: Request) -> Response:
    """Return what is loaded and what goes on."""
    pool_, info = front.pool, front.pool.info
    workers = [
        {
            "gpu": index,
            "device": worker.info.device if worker.info else None,
            "ready": bool(worker.info),
            "slots": worker.info.slots if worker.info else 0,
            "active": len(worker.streams),
            "restarts": worker.restarts,
            "error": worker.error,
        }
        for index, worker in enumerate(pool_.workers)
    ]
    model = info and {"name": info.name, "step": info.step, "stage": info.stage, "context": info.context}
    return JSONResponse(
        {
            "model": model,
            "notice": info.notice if info else None,
            "uptime_seconds": round(time.time() - front.started, 1),
            "queue": {"length": len(pool_.queue), "limit": pool_.queue_limit},
            "active": pool_.active,
            "workers": workers,
            "answers": pool_.counters.labelled("answers"),
            "tokens": pool_.counters.labelled("tokens").get("", 0),
        }
    )


async def metrics(front: Front, _: Request) -> Response:
    """Return the same for Prometheus."""
    pool_, counts = front.pool, front.pool.counters
    answered = [(f'{{finish="{label}"}}', n) for label, n in sorted(counts.labelled("answers").items())]
    restarts = [(f'{{gpu="{i}"}}', worker.restarts) for i, worker in enumerate(pool_.workers)]
    lines = [
        *scheduler.metric(
            "responses_total", "counter", "HTTP responses.", sorted(counts.labelled("responses").items())
        ),
        *scheduler.metric("answers_total", "counter", "Answers by how they ended.", answered),
        *scheduler.metric(
            "tokens_total", "counter", "Tokens of answers.", [("", counts.labelled("tokens").get("", 0))]
        ),
        *scheduler.metric("queue_length", "gauge", "Requests that wait for a slot.", [("", len(pool_.queue))]),
        *scheduler.metric("active", "gauge", "Requests that are being answered.", [("", pool_.active)]),
        *scheduler.metric("ready", "gauge", "1 if some replica can answer.", [("", int(pool_.ready))]),
        *scheduler.metric("restarts_total", "counter", "Starts of a replica after its first.", restarts),
        *scheduler.histogram("first_token_seconds", "From a request to its first token.", counts),
        *scheduler.histogram("answer_seconds", "From a request to the last token of its answer.", counts),
    ]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def describe(_: Front, __: Request) -> Response:
    """Return the description of this API."""
    return JSONResponse(schema.openapi())


async def models(front: Front, _: Request) -> Response:
    """Return the one model, as OpenAI's list."""
    info = front.pool.info
    return JSONResponse(schema.models([info.name] if info else [], int(front.started)))


# Answers


async def chat(front: Front, request: Request) -> Response:
    """Answer in our own dialect: a stream of pieces."""
    wanted = schema.chat(schema.decode(await middleware.body(request, front.limits)))
    streams, updates, _ = await _begin(front, wanted)
    (stream,) = streams

    async def chunks() -> AsyncIterator[bytes]:
        async for update in updates:
            found = [schema.token(piece, stream.worker or 0) for piece in update.pieces]
            if update.finish:
                found.append({"done": True, "finish_reason": update.finish})
            yield _events(found, update.error)

    return _Streaming(front.pool, streams, chunks())


async def completion(front: Front, request: Request) -> Response:
    """Answer in OpenAI's dialect, as a stream or whole."""
    wanted = schema.completion(schema.decode(await middleware.body(request, front.limits)))
    info = front.pool.info
    if info and wanted.model not in (None, info.name, MODEL_ALIAS):
        raise ApiError(404, f"there is no such model; there is {info.name}", param="model", code="model_not_found")
    streams, updates, name = await _begin(front, wanted)
    header = Header(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), name)
    if wanted.stream:
        return _Streaming(front.pool, streams, _openai_chunks(wanted, streams, updates, header))
    watch = asyncio.create_task(_cancel_when_gone(request.receive, front.pool, streams))
    pieces: list[list[Delta]] = [[] for _ in streams]
    reasons = ["" for _ in streams]
    try:
        async for update in updates:
            pieces[update.index] += update.pieces
            reasons[update.index] = update.finish or ""
            if update.error:
                raise ApiError(500, update.error, kind="server_error")
    finally:
        watch.cancel()
        _cancel_all(front.pool, streams)
    return JSONResponse(schema.whole(header, list(zip(pieces, reasons)), _usage(streams)))


async def _openai_chunks(
    wanted: Chat, streams: Sequence[Stream], updates: AsyncIterator[Update], header: Header
) -> AsyncIterator[bytes]:
    more = {"usage": None} if wanted.include_usage else {}

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return schema.chunk(header, index, delta, finish) | more

    yield _events([chunk(index, {"role": "assistant", "content": ""}) for index in range(len(streams))])
    async for update in updates:
        found = [chunk(update.index, schema.delta(piece)) for piece in update.pieces]
        if update.finish:
            found.append(chunk(update.index, {}, update.finish))
        yield _events(found, update.error)
        if update.error:
            return
    if wanted.include_usage:
        yield schema.event(schema.usage_chunk(header, _usage(streams)))
    yield schema.END_OF_STREAM


async def _begin(front: Front, wanted: Chat) -> tuple[list[Stream], AsyncIterator[Update], str]:
    """Queue the answers to a request. Returns their streams, what will come of them, and the model's name."""
    info = front.pool.info
    if info is None:
        raise ApiError(503, "the model is being loaded", kind="overloaded_error", headers={"Retry-After": "5"})
    try:
        prompt = await asyncio.to_thread(chat_format.prompt, info.tokenizer, wanted.messages)
    except chat_format.ConversationError as error:
        raise ApiError(400, str(error), param="messages") from None
    if len(prompt) >= info.context:
        long = f"the conversation has {len(prompt)} tokens: with an answer of at least one, {info.context} are allowed"
        raise ApiError(400, long, param="messages", code="context_length_exceeded")
    seed = wanted.sampling.seed if wanted.sampling.seed is not None else secrets.randbits(63)
    samplings = [dataclasses.replace(wanted.sampling, seed=(seed + i) % 2**63) for i in range(wanted.n)]
    wake = asyncio.Event()
    streams = scheduler.submit(front.pool, prompt, samplings, wake)
    stoppers = [schema.StopSequenceFilter(wanted.stop) for _ in streams]
    readers = [chat_format.Reader(info.tokenizer) for _ in streams]
    return streams, _updates(front.pool, streams, wake, readers, stoppers), info.name


async def _updates(
    pool_: Scheduler,
    streams: Sequence[Stream],
    wake: asyncio.Event,
    readers: Sequence[chat_format.Reader],
    stoppers: Sequence[schema.StopSequenceFilter],
) -> AsyncIterator[Update]:
    """Yield what comes of the streams until all have ended; an empty update after a long silence."""
    going = list(range(len(streams)))
    while going:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                await wake.wait()
        except TimeoutError:
            yield Update(going[0], [], None, None)
            continue
        wake.clear()
        for index in tuple(going):
            stream, reader, stopper = streams[index], readers[index], stoppers[index]
            ended, tokens = stream.ended, scheduler.take(stream)
            if not ended and not tokens:
                continue
            read = [piece for token in tokens for piece in reader.feed(token)] + (reader.close() if ended else [])
            pieces = stopper.feed(read) + (stopper.close() if ended else [])
            finish, error = stream.finish, stream.error
            if stopper.stopped:
                scheduler.cancel(pool_, stream)
                ended, finish, error = True, "stop", None
            if ended:
                going.remove(index)
            if ended or pieces:
                yield Update(index, schema.merge(pieces), finish, error)


class _Streaming(Response):
    """A stream of server-sent events. Whoever leaves it, in whatever way, leaves no stream behind."""

    def __init__(self, pool_: Scheduler, streams: Sequence[Stream], chunks: AsyncIterator[bytes]) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._pool, self._streams, self._chunks = pool_, streams, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_cancel_when_gone(receive, self._pool, self._streams))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except Exception:
                log.exception("a stream broke off")
                broken = _events([], "the server failed in the middle of the answer")
                await send({"type": "http.response.body", "body": broken, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            _cancel_all(self._pool, self._streams)


async def _cancel_when_gone(receive: Receive, pool_: Scheduler, streams: Sequence[Stream]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _cancel_all(pool_, streams)


def _cancel_all(pool_: Scheduler, streams: Sequence[Stream]) -> None:
    for stream in streams:
        scheduler.cancel(pool_, stream)


def _usage(streams: Sequence[Stream]) -> dict[str, int]:
    return schema.usage(len(streams[0].prompt), sum(stream.count for stream in streams))


# Errors


def _events(values: Sequence[dict[str, Any]], error: str | None = None) -> bytes:
    """Return server-sent events, an error at the end if there is one; without anything a comment, to show life."""
    if error is not None:
        values = [*values, schema.error_body(ApiError(500, error, kind="server_error"))]
    return b"".join(map(schema.event, values)) or b": waiting\n\n"


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return middleware.refusal(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    wrong = f"{path} has no method {request.method}" if error.status_code == 405 else f"there is no {path}"
    return middleware.refusal(ApiError(error.status_code, wrong, headers=dict(error.headers or {})))
