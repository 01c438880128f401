"""The web server: routes, streams, and what happens when a client disconnects.

This process holds no model: it checks requests, queues them (`scheduler`) and turns tokens into text. Conversations are
kept only while they are answered, and never logged.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import prometheus_client
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from nanochat import infer
from nanochat.data import Tokenizer, chat_format
from nanochat.data.chat_format import Piece
from nanochat.serve import middleware, page, schema
from nanochat.serve import scheduler as scheduling
from nanochat.serve.middleware import Limits
from nanochat.serve.scheduler import Scheduler, Stream
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest

MODEL_ALIAS = "nanochat"  # a name for every model
KEEP_ALIVE_SECONDS = 15.0  # of silence in a stream, after which a comment shows that the connection is alive
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

log = logging.getLogger("nanochat.serve")


def create_app(scheduler: Scheduler, limits: Limits) -> FastAPI:
    """Return the application; it starts the workers and stops them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduling.start(scheduler)
        yield
        await scheduling.stop(scheduler)

    app = FastAPI(
        title="nanochat",
        version="1",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(middleware.SecurityMiddleware, limits=limits, scheduler=scheduler)],
        exception_handlers={HTTPException: _handle_error, RequestValidationError: _handle_error},
        responses={"default": {"model": schema.ErrorResponse, "description": "An error."}},
    )
    app.router.route_class = StrictJsonRoute
    app.state.scheduler, app.state.limits, app.state.start_time = scheduler, limits, time.time()
    page.add_routes(app)
    options: Any
    for path, endpoint, options in (
        ("/health", health, {}),
        ("/stats", stats, {}),
        ("/metrics", metrics, {"response_class": PlainTextResponse}),
        ("/v1/models", models, {}),
    ):
        app.get(path, **options)(endpoint)
        app.head(path, include_in_schema=False)(endpoint)
    stream: dict[str, Any] = {"responses": {200: {"description": "The answer.", "content": {"text/event-stream": {}}}}}
    app.post("/chat/completions", response_class=StreamingResponse, **stream)(chat)
    app.post("/v1/chat/completions", response_model=schema.Completion, **stream)(completion)
    return app


class StrictJsonRequest(Request):
    """A request whose body is limited in size and time, and whose JSON is strict."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await middleware.read_body(self, self.app.state.limits)
        return self._body

    async def json(self) -> Any:
        return schema.decode(await self.body())


class StrictJsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict_handler(request: Request) -> Response:
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict_handler


# State of the server


async def health(request: Request, response: Response) -> dict[str, Any]:
    """Return whether the server can answer, with status 503 while it shuts down; open to everyone."""
    scheduler: Scheduler = request.app.state.scheduler
    status = "ok" if scheduler.ready else "restarting" if scheduler.info else "loading"
    if scheduler.draining:  # a load balancer has to send new requests elsewhere
        status, response.status_code = "draining", 503
    workers = [{"gpu": index, "ready": bool(worker.info)} for index, worker in enumerate(scheduler.workers)]
    notice = scheduler.info.notice if scheduler.info else None
    ready = scheduler.ready and not scheduler.draining
    return {"status": status, "ready": ready, "workers": workers, "notice": notice}


async def stats(request: Request) -> dict[str, Any]:
    """Return the model, the load and the workers."""
    scheduler: Scheduler = request.app.state.scheduler
    info, counts = scheduler.info, scheduler.metrics
    answers = {finish: int(counts.value("answers_total", finish=finish)) for finish in scheduling.FINISHES}
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
        for index, worker in enumerate(scheduler.workers)
    ]
    return {
        "model": info and {"name": info.name, "step": info.step, "stage": info.stage, "context": info.context},
        "notice": info.notice if info else None,
        "uptime_seconds": round(time.time() - request.app.state.start_time, 1),
        "queue": {"length": len(scheduler.queue), "limit": scheduler.queue_limit},
        "active": scheduler.active,
        "workers": workers,
        "answers": {finish: n for finish, n in answers.items() if n},
        "tokens": int(counts.value("tokens_total")),
    }


async def metrics(request: Request) -> PlainTextResponse:
    """Return metrics in the format of Prometheus."""
    content = prometheus_client.generate_latest(request.app.state.scheduler.metrics.registry)
    return PlainTextResponse(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def models(request: Request) -> dict[str, Any]:
    """Return the model, as OpenAI's list."""
    info, created = request.app.state.scheduler.info, int(request.app.state.start_time)
    data = [{"id": info.name, "object": "model", "created": created, "owned_by": "nanochat"}] if info else []
    return {"object": "list", "data": data}


# Answers


class Update(NamedTuple):
    """What is new of a request's `index`-th answer; `finish` or `error` on its last update."""

    index: int
    pieces: Sequence[Piece] = ()
    finish: str | None = None
    error: ApiError | None = None


async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer in our own dialect, as a stream."""
    scheduler: Scheduler = request.app.state.scheduler
    streams, updates = await _submit(scheduler, body)

    async def events() -> AsyncIterator[bytes]:
        async for update in updates:
            values = [schema.token_event(piece, streams[0].worker or 0) for piece in update.pieces]
            if update.finish:
                values.append({"done": True, "finish_reason": update.finish})
            yield _encode(values, update.error)

    return EventStream(scheduler, streams, events())


async def completion(request: Request, body: CompletionRequest) -> Any:
    """Answer in OpenAI's dialect, as a stream or in one piece."""
    scheduler: Scheduler = request.app.state.scheduler
    info = scheduler.info
    if info and body.model not in (None, info.name, MODEL_ALIAS):
        raise ApiError(404, f"no such model; this server has {info.name}", param="model", code="model_not_found")
    streams, updates = await _submit(scheduler, body, body.n, body.stop)
    assert info
    header: Any = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
    header |= {"created": int(time.time()), "model": info.name}
    if body.stream:
        header["object"] += ".chunk"
        return EventStream(scheduler, streams, _chunks(body, streams, updates, header))
    pieces: list[list[Piece]] = [[] for _ in streams]
    reasons = [""] * len(streams)
    async with _cancelled_on_exit(request.receive, scheduler, streams):
        async for update in updates:
            pieces[update.index] += update.pieces
            reasons[update.index] = update.finish or ""
            if update.error:
                raise update.error
    choices = [
        schema.Choice(index=index, message=schema.assistant_message(answer), finish_reason=reason)
        for index, (answer, reason) in enumerate(zip(pieces, reasons))
    ]
    return schema.Completion(**header, choices=choices, usage=_usage(streams))


async def _chunks(
    body: CompletionRequest, streams: Sequence[Stream], updates: AsyncIterator[Update], header: dict[str, Any]
) -> AsyncIterator[bytes]:
    include_usage = body.stream_options is not None and body.stream_options.include_usage

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return header | {"choices": [choice]} | ({"usage": None} if include_usage else {})

    yield _encode([chunk(index, {"role": "assistant", "content": ""}) for index in range(len(streams))])
    async for update in updates:
        values = [chunk(update.index, schema.delta(piece)) for piece in update.pieces]
        if update.finish:
            values.append(chunk(update.index, {}, update.finish))
        yield _encode(values, update.error)
        if update.error:
            return
    if include_usage:
        yield _encode([header | {"choices": [], "usage": _usage(streams)}])
    yield b"data: [DONE]\n\n"


def _usage(streams: Sequence[Stream]) -> schema.Usage:
    prompt, answers = len(streams[0].request.prompt), sum(stream.n_tokens for stream in streams)
    return schema.Usage(prompt_tokens=prompt, completion_tokens=answers, total_tokens=prompt + answers)


def _encode(values: Sequence[BaseModel | dict[str, Any]], error: ApiError | None = None) -> bytes:
    """Return server-sent events, an error at the end if there is one; a comment if there are none."""
    if error is not None:
        values = [*values, error.body]
    return b"".join(map(schema.event, values)) or b": waiting\n\n"


async def _submit(
    scheduler: Scheduler, body: ChatRequest, n: int = 1, stops: Sequence[str] = ()
) -> tuple[list[Stream], AsyncIterator[Update]]:
    """Queue the answers to a request; returns their streams and their updates."""
    info = scheduler.info
    if info is None:
        raise scheduling.overloaded("the model is loading", 5)
    try:
        prompt = await asyncio.to_thread(chat_format.prompt, info.tokenizer, schema.conversation(body.messages))
    except chat_format.ConversationError as error:
        raise ApiError(400, str(error), param="messages") from None
    if len(prompt) >= info.context:
        message = f"the conversation has {len(prompt)} tokens; at most {info.context - 1} are allowed before an answer"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    requests = [
        infer.Request(tuple(prompt), body.token_limit, body.temperature, body.top_k, (seed + i) % 2**63)
        for i in range(n)
    ]
    wake = asyncio.Event()
    streams = scheduling.submit(scheduler, requests, wake)
    return streams, _updates(scheduler, streams, wake, info.tokenizer, stops)


async def _updates(
    scheduler: Scheduler, streams: Sequence[Stream], wake: asyncio.Event, tokenizer: Tokenizer, stops: Sequence[str]
) -> AsyncIterator[Update]:
    """Yield what is new until all streams have ended; an empty update after a long silence."""
    running = {
        i: (stream, chat_format.Reader(tokenizer), StopSequenceFilter(stops)) for i, stream in enumerate(streams)
    }
    while running:
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                await wake.wait()
        except TimeoutError:
            yield Update(next(iter(running)))
            continue
        wake.clear()
        for index, (stream, detokenizer, stop_filter) in tuple(running.items()):
            ended, finish, error = stream.ended, stream.finish, stream.error
            tokens, stream.tokens, stream.logprobs = stream.tokens, [], []
            texts = [piece for token in tokens for piece in detokenizer.feed(token)]
            pieces = stop_filter.feed(texts + (detokenizer.close() if ended else []))
            pieces += stop_filter.close() if ended else []
            if stop_filter.stopped:
                scheduling.cancel(scheduler, stream)
                ended, finish, error = True, "stop", None
            if ended:
                del running[index]
            if ended or pieces:
                yield Update(index, schema.merge(pieces), finish, error)


class StopSequenceFilter:
    """Ends an answer before the first of some texts; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, stops)) or "(?!)")
        self._starts = {stop[:n] for stop in stops for n in range(1, len(stop))}
        self._held = ""
        self.stopped = False

    def feed(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces that can be sent; none once `stopped`. Tool calls pass unchecked."""
        passed: list[Piece] = []
        for kind, text in pieces:
            if self.stopped:
                break
            if kind != "text":
                passed += [*self.close(), Piece(kind, text)]
                continue
            text = self._held + text
            if match := self._pattern.search(text):
                end, self.stopped = match.start(), True
            else:
                end = next((i for i in range(len(text)) if text[i:] in self._starts), len(text))
            self._held = text[end:]
            passed += [Piece("text", text[:end])] if end else []
        return passed

    def close(self) -> list[Piece]:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return [Piece("text", held)] if held and not self.stopped else []


class EventStream(StreamingResponse):
    """Server-sent events; its streams are cancelled however it ends."""

    def __init__(self, scheduler: Scheduler, streams: Sequence[Stream], chunks: AsyncIterator[bytes]) -> None:
        super().__init__(_without_exceptions(chunks), headers=STREAM_HEADERS, media_type="text/event-stream")
        self._scheduler, self._streams = scheduler, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _cancelled_on_exit(receive, self._scheduler, self._streams):
            await self.stream_response(send)


async def _without_exceptions(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    except Exception:  # the status line is sent: the client can only be told in the stream, the operator in the log
        log.exception("a stream failed")
        yield _encode([], schema.server_error("internal server error in the middle of the answer"))


@contextlib.asynccontextmanager
async def _cancelled_on_exit(receive: Receive, scheduler: Scheduler, streams: Sequence[Stream]) -> AsyncIterator[None]:
    """Cancel the streams when the client disconnects or the block ends."""

    def cancel() -> None:
        for stream in streams:
            scheduling.cancel(scheduler, stream)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        cancel()


async def _handle_error(request: Request, error: Any) -> Response:
    if isinstance(error, RequestValidationError):
        error = schema.validation_error(error.errors())
    elif not isinstance(error, ApiError):  # the router's
        path = request.url.path
        message = f"{path} has no method {request.method}" if error.status_code == 405 else f"there is no {path}"
        error = ApiError(error.status_code, message, headers=error.headers)
    return middleware.error_response(error)
