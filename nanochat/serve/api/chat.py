"""The routes that answer in a chat, in our own dialect and in OpenAI's; tool calls of both."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from fastapi import Request, Response

from nanochat.data import Tokenizer, chat_format
from nanochat.data.chat_format import Piece
from nanochat.serve import schema
from nanochat.serve.api import answers
from nanochat.serve.api.answers import EventStream, TokenInfo, Update
from nanochat.serve.scheduler import Scheduler, Stream
from nanochat.serve.schema import ApiError, CompletionRequest, Message
from nanochat.serve.worker import WorkerInfo

PART_TYPES = {"text": "text", "python": "python", "output": "python_output"}  # of the kinds of a Piece


async def chat(request: Request, body: schema.ChatRequest) -> Response:
    """Answer in our own dialect, as a stream."""
    scheduler: Scheduler = request.app.state.scheduler
    info = answers.ready_model(scheduler, request.app.state.api, body.model)
    prompt = await asyncio.to_thread(prompt_ids, info, body.messages)
    requests = answers.sampling_requests(body, request.app.state.api, info, prompt, _max_tokens(request, body))
    streams, updates = answers.submit(scheduler, info, requests)

    async def events() -> AsyncIterator[bytes]:
        async for update in updates:
            values = [_token_event(piece, streams[0].worker or 0) for piece in update.pieces]
            if update.finish:
                values.append({"done": True, "finish_reason": update.finish})
            yield answers.encode(values, update.error)

    return EventStream(scheduler, streams, events())


async def completion(request: Request, body: CompletionRequest) -> Any:
    """Answer in OpenAI's dialect, as a stream or in one piece."""
    scheduler: Scheduler = request.app.state.scheduler
    info = answers.ready_model(scheduler, request.app.state.api, body.model)
    special = info.tokenizer.special
    prompt = await asyncio.to_thread(prompt_ids, info, body.messages)
    options: dict[str, Any] = {"stops": body.stop, "with_tokens": body.logprobs}
    if body.tool:
        options["call_end"] = special("<|python_end|>")
        if body.tool_choice != "auto":
            options["before"] = [special("<|python_start|>")]  # the model can only go on with a call
    prompt += options.get("before", ())
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens, grammar = _max_tokens(request, body), await answers.grammar_of(body.response_format)
    requests = answers.sampling_requests(
        body, request.app.state.api, info, prompt, max_tokens, n=body.n, logprobs=logprobs, grammar=grammar
    )
    streams, updates = answers.submit(scheduler, info, requests, **options)
    header: Any = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
    header |= {"created": int(time.time()), "model": info.name}
    if body.stream:
        header["object"] += ".chunk"
        return EventStream(scheduler, streams, _chunks(body, info, prompt, streams, updates, header))
    pieces: list[list[Piece]] = [[] for _ in streams]
    tokens: list[list[TokenInfo]] = [[] for _ in streams]
    reasons = [""] * len(streams)
    async with answers.cancelled_on_exit(request.receive, scheduler, streams):
        async for update in updates:
            pieces[update.index] += update.pieces
            tokens[update.index] += update.tokens
            reasons[update.index] = update.finish or ""
            if update.error:
                raise update.error
    choices = [
        schema.Choice(
            index=index,
            message=_message(answer, body.tool if reason == "tool_calls" else None),
            logprobs=_logprobs(body, info.tokenizer, tokens[index]),
            finish_reason=reason,
        )
        for index, (answer, reason) in enumerate(zip(pieces, reasons))
    ]
    return schema.Completion(**header, choices=choices, usage=_usage(prompt, streams))


async def _chunks(
    body: CompletionRequest,
    info: WorkerInfo,
    prompt: Sequence[int],
    streams: Sequence[Stream],
    updates: AsyncIterator[Update],
    header: dict[str, Any],
) -> AsyncIterator[bytes]:
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    calls: list[list[Piece]] = [[] for _ in streams]  # of a declared tool, sent when they are complete

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return header | {"choices": [choice]} | ({"usage": None} if include_usage else {})

    yield answers.encode([chunk(index, {"role": "assistant", "content": ""}) for index in range(len(streams))])
    async for index, pieces, tokens, finish, error in updates:
        if body.tool:
            calls[index] += [piece for piece in pieces if piece.kind == "python"]
            pieces = [piece for piece in pieces if piece.kind == "text"]
        values = [chunk(index, _delta(piece)) for piece in pieces]
        logprobs = _logprobs(body, info.tokenizer, tokens)
        if logprobs and logprobs.content:
            values = values or [chunk(index, {"content": ""})]
            values[0]["choices"][0]["logprobs"] = logprobs
        if finish == "tool_calls" and body.tool:
            call = _tool_call(calls[index], body.tool).model_dump() | {"index": 0}
            values.append(chunk(index, {"tool_calls": [call]}))
        if finish:
            values.append(chunk(index, {}, finish))
        yield answers.encode(values, error)
        if error:
            return
    if include_usage:
        yield answers.encode([header | {"choices": [], "usage": _usage(prompt, streams)}])
    yield b"data: [DONE]\n\n"


def _usage(prompt: Sequence[int], streams: Sequence[Stream]) -> schema.Usage:
    return answers.usage(len(prompt), sum(stream.n_tokens for stream in streams))


def _max_tokens(request: Request, body: schema.ChatRequest | CompletionRequest) -> int:
    limited = {"max_tokens", "max_completion_tokens"} & body.model_fields_set
    return body.token_limit if limited else request.app.state.api.max_tokens


# Prompts


def prompt_ids(info: WorkerInfo, messages: Sequence[Message], limit: int | None = 1) -> list[int]:
    """Return the tokens of a conversation up to where the answer starts, or goes on after the results of its calls.

    Refuses one that leaves less than `limit` tokens of the context for the answer.
    """
    given = conversation(messages)
    try:
        if messages[-1].role == "tool":
            ids = chat_format.render(info.tokenizer, {"messages": given})[0][:-1]  # without <|assistant_end|>
        else:
            ids = chat_format.prompt(info.tokenizer, given)
    except chat_format.ConversationError as error:
        raise ApiError(400, str(error), param="messages") from None
    if limit is not None and len(ids) > info.context - limit:
        message = f"the conversation has {len(ids)} tokens; at most {info.context - limit} are allowed before an answer"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    return ids


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return checked messages as `chat_format` takes them: calls, their results and what follows are one answer."""
    result: list[dict[str, Any]] = []
    waiting: dict[str, dict[str, Any]] = {}  # id of a call -> the part for its result
    after_result = False
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        parts = [part.model_dump() for part in message.nanochat_parts or message.content or ()]
        if message.role == "tool":
            part = waiting.pop(message.tool_call_id or "", None)
            if part is None:
                schema.refuse(
                    f"{where}.role",
                    "is \"tool\", expected 'system', 'developer', 'user' or 'assistant': no call of "
                    "the assistant before it has this tool_call_id",
                )
            part["text"] = "".join(x["text"] for x in parts)
            after_result = True
            continue
        if waiting:
            schema.refuse(
                f"{where}.role", f"is {message.role!r}, expected 'tool' with the result of the assistant's call"
            )
        for index, call in enumerate(message.tool_calls or ()):
            output = {"type": "python_output", "text": ""}
            parts += [{"type": "python", "text": _expression(call, f"{where}.tool_calls[{index}].function")}, output]
            if waiting.setdefault(call.id, output) is not output:
                schema.refuse(f"{where}.tool_calls[{index}].id", "is the id of another call")
        if after_result and message.role == "assistant":
            result[-1]["content"] += parts
        else:
            result.append({"role": message.role, "content": parts})
        after_result = False
    if waiting:
        schema.refuse("messages", "end before the result of the assistant's call, which role 'tool' gives")
    return result


def _expression(call: schema.ToolCall, where: str) -> str:
    if call.function.name != schema.CALCULATOR:
        schema.refuse(
            f"{where}.name", f"is {call.function.name[:40]!a}, expected {schema.CALCULATOR!r}, the model's only tool"
        )
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    if len(values) != 1 or not isinstance(values[0], str):
        schema.refuse(f"{where}.arguments", "is not a JSON object with one string, the expression")
    return values[0]


# Responses


def _token_event(piece: Piece, gpu: int) -> dict[str, Any]:
    """Return a piece in our own dialect."""
    return {"token": piece.text, "gpu": gpu} | ({} if piece.kind == "text" else {"kind": piece.kind})


def _delta(piece: Piece) -> dict[str, Any]:
    """Return a piece as OpenAI's delta."""
    return {"content": piece.text} if piece.kind == "text" else {"nanochat_parts": _parts([piece])}


def _parts(pieces: Iterable[Piece]) -> list[schema.Part]:
    return [schema.Part.model_validate({"type": PART_TYPES[kind], "text": text}) for kind, text in pieces]


def _message(pieces: Iterable[Piece], tool: schema.Function | None) -> schema.AssistantMessage:
    merged = schema.merge(pieces)
    content = "".join(text for kind, text in merged if kind == "text")
    if tool:
        calls = [piece for piece in merged if piece.kind == "python"]
        return schema.AssistantMessage(content=content or None, tool_calls=[_tool_call(calls, tool)])
    has_calls = any(kind != "text" for kind, _ in merged)
    return schema.AssistantMessage(content=content, nanochat_parts=_parts(merged) if has_calls else None)


def _tool_call(pieces: Iterable[Piece], tool: schema.Function) -> schema.ToolCall:
    arguments = {tool.argument: "".join(piece.text for piece in pieces)}
    function = schema.FunctionCall(name=tool.name, arguments=json.dumps(arguments, ensure_ascii=False))
    return schema.ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=function)


def _logprobs(body: CompletionRequest, tokenizer: Tokenizer, tokens: Iterable[TokenInfo]) -> schema.ChatLogprobs | None:
    if not body.logprobs:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return answers.logprob_entry(tokenizer, token, logprob)

    content = []
    for token in tokens:
        if token.kind == "text" and token.logprobs:
            chosen, others = token.logprobs
            top = [schema.TokenLogprob(**entry(*other)) for other in others[: body.top_logprobs or 0]]
            content.append(schema.ContentLogprob(**entry(token.id, chosen), top_logprobs=top))
    return schema.ChatLogprobs(content=content)
