"""From a request to its answers: sampling requests for the engine, and tokens back to text with log-probabilities."""

import asyncio
import contextlib
import dataclasses
import logging
import re
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from nanochat import infer
from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format
from nanochat.data.chat_format import Piece
from nanochat.serve import scheduler as scheduling
from nanochat.serve import schema
from nanochat.serve.scheduler import Scheduler, Stream
from nanochat.serve.schema import ApiError, SamplingRequest
from nanochat.serve.worker import WorkerInfo

MODEL_ALIAS = "nanochat"  # a name for every model
KEEP_ALIVE_SECONDS = 15.0  # of silence in a stream, after which a comment shows that the connection is alive
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
LEAST_LOGPROB = -9999.0  # as OpenAI writes minus infinity, which JSON does not have

log = logging.getLogger("nanochat.serve")


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """What the API takes where a request does not say it, see `schema.SamplingRequest`."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 512  # of an answer in a chat
    model_names: tuple[str, ...] = ("gpt-3.5-turbo", "davinci-002")  # further names of the first model; "*" is any name


class TokenInfo(NamedTuple):
    """A token of an answer."""

    id: int
    kind: str  # of its text, see `Piece`; "special" for a special token
    offset: int  # characters of the answer before it
    logprobs: infer.TokenLogprobs | None


class Update(NamedTuple):
    """What is new of a request's `index`-th answer; `finish` or `error` on its last update."""

    index: int
    pieces: Sequence[Piece] = ()
    tokens: Sequence[TokenInfo] = ()
    finish: str | None = None
    error: ApiError | None = None


# Requests


def ready_model(scheduler: Scheduler, config: ApiConfig, model: str | None = None) -> WorkerInfo:
    """Return the model with this name, or the first one for a name that any model has."""
    info = scheduler.info
    if info is None:
        raise scheduling.overloaded("the model is loading", 5)
    if model in scheduler.models:
        return scheduler.models[model]
    if model not in (None, MODEL_ALIAS, *config.model_names) and "*" not in config.model_names:
        names = ", ".join(scheduler.models)
        raise ApiError(404, f"no such model; this server has {names}", param="model", code="model_not_found")
    return info


def sampling_requests(
    body: SamplingRequest,
    config: ApiConfig,
    info: WorkerInfo,
    prompt: Sequence[int],
    max_tokens: int,
    n: int = 1,
    logprobs: int | None = None,
    grammar: str | None = None,
) -> list[infer.Request]:
    """Return n requests for answers to a prompt, which differ in their seeds."""
    values: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        values[name] = getattr(body if name in body.model_fields_set else config, name)
    vocab_size, bias = info.tokenizer.vocab_size, {}
    for token, value in body.logit_bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
            message = f"logit_bias has the key {token[:20]!r}, expected token ids from 0 to {vocab_size - 1}"
            raise ApiError(400, message.encode("ascii", "backslashreplace").decode(), param="logit_bias")
        bias[int(token)] = value
    values |= {"logprobs": logprobs, "logit_bias": tuple(bias.items())}
    values |= {
        "grammar": grammar,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    return [infer.Request(tuple(prompt), max_tokens, seed=(seed + i) % 2**63, **values) for i in range(n)]


async def grammar_of(schema: dict[str, Any] | None) -> str | None:
    """Return the grammar of the answers that a request asks for."""
    try:
        return None if schema is None else await asyncio.to_thread(infer.grammar.from_json_schema, schema)
    except UserError as error:
        raise ApiError(400, f"response_format is not supported for this: {error}", param="response_format") from None


def submit(
    scheduler: Scheduler, info: WorkerInfo, requests: Sequence[infer.Request], **options: Any
) -> tuple[list[Stream], AsyncIterator[Update]]:
    """Queue requests; returns their streams and their updates. Options are those of `AnswerReader`."""
    wake = asyncio.Event()
    streams = scheduling.submit(scheduler, info.name, requests, wake)
    readers = [AnswerReader(info.tokenizer, **options) for _ in streams]
    return streams, _updates(scheduler, streams, wake, readers)


async def _updates(
    scheduler: Scheduler, streams: Sequence[Stream], wake: asyncio.Event, readers: Sequence["AnswerReader"]
) -> AsyncIterator[Update]:
    """Yield what is new until all streams have ended; an empty update after a long silence."""
    running = dict(enumerate(zip(streams, readers)))
    while running:
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                await wake.wait()
        except TimeoutError:
            yield Update(next(iter(running)))
            continue
        wake.clear()
        for index, (stream, reader) in tuple(running.items()):
            ended, finish, error = stream.ended, stream.finish, stream.error
            new = zip(stream.tokens, stream.logprobs)
            stream.tokens, stream.logprobs = [], []
            pieces, tokens = reader.feed(new, ended)
            if reader.finish:
                scheduling.cancel(scheduler, stream)
                ended, finish, error = True, reader.finish, None
            if ended:
                del running[index]
            if ended or pieces or tokens:  # tokens: of less than a character
                yield Update(index, schema.merge(pieces), tokens, finish, error)


class AnswerReader:
    """Turns the tokens of an answer into text, up to a stop sequence or a token that ends it.

    Args:
        stops: texts before which it ends, with finish reason "stop".
        call_end: token after which it ends, with finish reason "tool_calls".
        before: tokens of the prompt that belong to the answer.
        raw: whether tool calls are text as well.
        with_tokens: whether to return the tokens, too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        call_end: int | None = None,
        before: Sequence[int] = (),
        raw: bool = False,
        with_tokens: bool = False,
    ) -> None:
        self._reader, self._filter = chat_format.Reader(tokenizer), StopSequenceFilter(stops)
        self._n_text_tokens, self._call_end = len(tokenizer.tokens), call_end
        self._raw, self._with_tokens = raw, with_tokens
        self._held: list[TokenInfo] = []  # until their text is sent
        self._read = self._sent = 0  # characters
        self.finish: str | None = None  # when it ends before the stream does
        for token in before:
            self._reader.feed(token)

    def feed(
        self, tokens: Iterable[tuple[int, infer.TokenLogprobs | None]], ended: bool
    ) -> tuple[list[Piece], list[TokenInfo]]:
        """Return the text and the tokens that can be sent."""
        texts: list[Piece] = []
        for token, logprobs in tokens:
            in_call, new = self._reader.kind == "python", self._reader.feed(token)
            if self._with_tokens:
                kind = self._reader.kind if token < self._n_text_tokens else "special"
                self._held.append(TokenInfo(token, kind, self._read, logprobs))
                self._read += sum(len(piece.text) for piece in new)
            texts += new
            if in_call and token == self._call_end:
                self.finish, ended = "tool_calls", True
                break
        texts += self._reader.close() if ended else []
        pieces = self._filter.feed([Piece("text", text) for _, text in texts] if self._raw else texts)
        pieces += self._filter.close() if ended else []
        if self._filter.stopped:
            self.finish = "stop"
        return pieces, self._release(pieces, ended) if self._held else []

    def _release(self, pieces: Sequence[Piece], ended: bool) -> list[TokenInfo]:
        """Return the tokens whose text begins within what is sent."""
        self._sent += sum(len(piece.text) for piece in pieces)
        held, self._held = self._held, []
        for i, token in enumerate(held):
            if token.offset >= self._sent and not (ended and self.finish != "stop"):
                self._held = held[i:]
                return held[:i]
        return held


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
        async with cancelled_on_exit(receive, self._scheduler, self._streams):
            await self.stream_response(send)


async def _without_exceptions(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    except Exception:  # the status line is sent: the client can only be told in the stream, the operator in the log
        log.exception("a stream failed")
        yield encode([], schema.server_error("internal server error in the middle of the answer"))


@contextlib.asynccontextmanager
async def cancelled_on_exit(receive: Receive, scheduler: Scheduler, streams: Sequence[Stream]) -> AsyncIterator[None]:
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


def encode(values: Sequence[BaseModel | dict[str, Any]], error: ApiError | None = None) -> bytes:
    """Return server-sent events, an error at the end if there is one; a comment if there are none."""
    if error is not None:
        values = [*values, error.body]
    return b"".join(map(schema.event, values)) or b": waiting\n\n"


def usage(prompt: int, completion: int) -> schema.Usage:
    return schema.Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; `bytes:` and its bytes, as OpenAI does, if it is not text by itself."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def logprob_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Return a token's log-probability as OpenAI writes it for chats."""
    data = list(tokenizer.decode_bytes([token]))
    return {"token": token_text(tokenizer, token), "logprob": finite(logprob), "bytes": data}
