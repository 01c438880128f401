"""The HTTP API's requests: JSON checked into frozen values, or refused with a clear error. Pure: bytes in, values out.

Two dialects. Our own (`chat`) is four sampling parameters and a stream of pieces; OpenAI's (`completion`) accepts what
this model can do, accepts what changes nothing, and refuses the rest: a parameter that is ignored in silence would make
the client believe in an answer that it did not get. Every error has OpenAI's shape, on every route.

The description of the HTTP API (OpenAPI 3.1), from the same numbers that requests are checked with.

The HTTP API's answers: pieces of text as server-sent events and as OpenAI's objects. Pure, as `nanochat.api`.

What a tool was asked and what it answered is no part of OpenAI's `content`; it goes into a field of our own,
`nanochat_parts`: the parts of a message (of a delta: the new ones), as conversations have them. A client that sends a
message back as it got it thereby gives the model its own tool calls again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CHARS = 32_000
MAX_BODY_BYTES = 2**20  # 32,000 characters, each of them two escapes of six bytes, and 500 messages around them
MAX_DIGITS = 25  # of a whole number: more than any bound here, and few enough for int()
MAX_STOPS = 4
MAX_STOP_CHARS = 256


class Number(NamedTuple):
    """A numeric parameter: its bounds (both allowed), whether it is whole, and what it is when absent."""

    low: int
    high: int
    whole: bool
    default: float | None
    about: str


NUMBERS = {
    "temperature": Number(0, 2, False, 0.8, "0 takes the most likely token."),
    "top_k": Number(0, 200, True, 50, "Sample among so many of the most likely tokens; 0: all."),
    "max_tokens": Number(1, 4096, True, 512, "The answer ends after so many tokens, or where the context does."),
    "seed": Number(-(2**63), 2**63 - 1, True, None, "The same seed gives the same answer; absent: a random one."),
    "n": Number(1, 8, True, 1, "Number of answers."),
}
NATIVE = ("messages", "temperature", "max_tokens", "top_k", "seed")
# Parameters of OpenAI's that change no answer here, whatever their value.
HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
)
# Parameters of OpenAI's that this server does not have, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1, 1.0),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
PART_TYPES = ("text", "python", "python_output")  # of an assistant's message


class ApiError(Exception):
    """A refusal, as the client is to see it.

    Attributes:
        status: HTTP's. message: one sentence. kind, param, code: OpenAI's `type`, `param` and `code`.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the JSON of an error, the same on all routes and within streams."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


@dataclass(frozen=True)
class Sampling:
    """How to draw an answer: see `NUMBERS`; `seed` None stands for a random one."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512
    seed: int | None = None


@dataclass(frozen=True)
class Chat:
    """A checked request.

    Attributes:
        messages: as `conversation.prompt` takes them. sampling: of the first answer.
        n: number of answers; the i-th is drawn with the seed + i.
        stream: answer piece by piece. include_usage: and with a last chunk that counts tokens.
        stop: texts before which an answer ends. model: the name the client asked for, or None.
    """

    messages: tuple[dict[str, Any], ...]
    sampling: Sampling
    n: int = 1
    stream: bool = True
    include_usage: bool = False
    stop: tuple[str, ...] = ()
    model: str | None = None


# Requests


def decode(body: bytes) -> dict[str, Any]:
    """Return the JSON object that `body` is.

    Raises:
        ApiError: 400; not UTF-8, not JSON, not an object, a key twice, NaN or Infinity, or nested too deeply.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant
        )
    except UnicodeDecodeError as error:
        _refuse(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}", code="invalid_json")
    except RecursionError:
        _refuse("the body is not usable: nested too deeply", code="invalid_json")
    except ValueError as error:
        _refuse(f"the body is not JSON: {error}", code="invalid_json")
    if not isinstance(value, dict):
        _refuse(f"the body is {_shown(value)}, expected a JSON object", code="invalid_json")
    return value


def chat(body: Mapping[str, Any]) -> Chat:
    """Check a request of our own dialect.

    Raises:
        ApiError: 400, naming the parameter.
    """
    for name in body:
        if name not in NATIVE:
            _refuse(f"there is no parameter {_shown(name)}; there are {', '.join(NATIVE)}", _safe(name))
    return Chat(messages(body.get("messages")), _sampling(body))


def completion(body: Mapping[str, Any]) -> Chat:
    """Check a request of OpenAI's dialect.

    Raises:
        ApiError: 400, naming the parameter.
    """
    given = {name: value for name, value in body.items() if value is not None}  # null stands for absent
    known = {*NATIVE, *HARMLESS, *NEUTRAL, "model", "n", "stream", "stream_options", "stop", "max_completion_tokens"}
    for name, value in given.items():
        if name not in known:
            _refuse(f"the parameter {_shown(name)} is not supported", _safe(name), "unsupported_parameter")
        if name in NEUTRAL and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            _refuse(f"{name} is not supported: leave it out", name, "unsupported_parameter")
    limits = [given[name] for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(limits) == 2 and limits[0] != limits[1]:
        _refuse("max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")
    if "max_completion_tokens" in given:
        _number("max_tokens", limits[-1], "max_completion_tokens")
        given["max_tokens"] = limits[-1]
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        _refuse("stream_options: expected an object with include_usage", "stream_options")
    if "stream_options" in given and not _flag(given, "stream"):
        _refuse("stream_options is for streams: set stream to true", "stream_options")
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        _refuse(f"model is {_shown(model)}, expected a string", "model")
    return Chat(
        messages(given.get("messages")),
        _sampling(given),
        int(_number("n", given.get("n"))),
        _flag(given, "stream"),
        _flag(options, "include_usage", "stream_options.include_usage"),
        _stops(given.get("stop")),
        model,
    )


def messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Check a conversation's messages; what turns they may take is `conversation.check`'s to say.

    Raises:
        ApiError: 400, naming the message.
    """
    if value is None:
        _refuse("messages is missing", "messages")
    if not isinstance(value, list):
        _refuse(f"messages is {_shown(value)}, expected a list", "messages")
    if not value:
        _refuse("messages is empty: expected at least one message", "messages")
    if len(value) > MAX_MESSAGES:
        _refuse(f"{len(value)} messages: at most {MAX_MESSAGES} are allowed", "messages")
    checked = tuple(_message(message, number) for number, message in enumerate(value))
    chars = sum(_chars(message["content"]) for message in checked)
    if chars > MAX_CHARS:
        _refuse(f"the messages have {chars:,} characters: at most {MAX_CHARS:,} in all are allowed", "messages")
    return checked


def _message(message: Any, number: int) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        _refuse(f"{where} is {_shown(message)}, expected an object with role and content", where)
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    for name in message:
        if name not in ("role", "content", "nanochat_parts"):
            _refuse(f"{where}: {_shown(name)} is not supported", where, "unsupported_parameter")
    if role not in ("user", "assistant") and not (role == "system" and number == 0):
        later = "; a system message comes first" if role == "system" else ""
        _refuse(f"{where}.role is {_shown(role)}, expected user or assistant{later}", f"{where}.role")
    name = "nanochat_parts" if "nanochat_parts" in message else "content"
    if name == "nanochat_parts" and role != "assistant":
        _refuse(f"{where}: nanochat_parts is for the assistant's messages", f"{where}.nanochat_parts")
    content = message.get(name)
    if isinstance(content, list):
        content = _parts(content, f"{where}.{name}", role == "assistant")
    elif not isinstance(content, str) or name != "content":
        wanted = "a string or a list of parts" if name == "content" else "a list of parts"
        _refuse(f"{where}.{name} is {_shown(content)}, expected {wanted}", f"{where}.{name}")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        _refuse(f"{where}.{name} has half of a surrogate pair, which is no character", f"{where}.{name}")
    if not any(texts):
        _refuse(f"{where}.{name} is empty", f"{where}.{name}")
    if _chars(content) > MAX_MESSAGE_CHARS:
        long = f"has {_chars(content):,} characters: at most {MAX_MESSAGE_CHARS:,} are allowed"
        _refuse(f"{where}.{name} {long}", f"{where}.{name}")
    return {"role": role, "content": content}


def _parts(parts: list[Any], where: str, assistant: bool) -> str | list[dict[str, str]]:
    """Return parts as they are if there is a tool call among them, else their text (a user's parts are lines)."""
    kinds = PART_TYPES if assistant else ("text",)
    for number, part in enumerate(parts):
        if not (isinstance(part, dict) and set(part) == {"type", "text"} and isinstance(part["text"], str)):
            _refuse(f'{where}[{number}]: expected {{"type": ..., "text": "..."}}', f"{where}[{number}]")
        if not any(part["type"] == kind for kind in kinds):
            got = f"{where}[{number}].type is {_shown(part['type'])}, expected {' or '.join(kinds)}"
            _refuse(got, f"{where}[{number}].type")
    if all(part["type"] == "text" for part in parts):
        return ("" if assistant else "\n").join(part["text"] for part in parts)
    return [dict(part) for part in parts]


def _chars(content: str | list[dict[str, str]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def _sampling(body: Mapping[str, Any]) -> Sampling:
    values = {name: _number(name, body.get(name)) for name in ("temperature", "top_k", "max_tokens")}
    seed = body.get("seed")
    return Sampling(
        float(values["temperature"]),
        int(values["top_k"]),
        int(values["max_tokens"]),
        None if seed is None else int(_number("seed", seed)),
    )


def _number(name: str, value: Any, shown_as: str | None = None) -> float:
    """Return the parameter's value, or its default for None."""
    low, high, whole, default, _ = NUMBERS[name]
    value = default if value is None else value
    kind = isinstance(value, int | float) and not isinstance(value, bool)  # true is no number
    if not kind or not low <= value <= high or (whole and value != int(value)):
        wanted = f"a {'whole ' if whole else ''}number from {low} to {high}"
        _refuse(f"{shown_as or name} is {_shown(value)}, expected {wanted}", shown_as or name)
    return value


def _flag(body: Mapping[str, Any], name: str, param: str | None = None) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(f"{param or name} is {_shown(value)}, expected true or false", param or name)
    return bool(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        _refuse(f"stop: expected a text, or a list of up to {MAX_STOPS} texts that are not empty", "stop")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        _refuse(f"stop: at most {MAX_STOP_CHARS} characters are allowed", "stop")
    return tuple(stops)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {_shown(twice)} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral  # 1 and True are equal, and not the same


def _shown(value: Any) -> str:
    """Return a value for a message: short, and without walking into what may be deep."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value[:40] if isinstance(value, str) else value)
    return "missing" if value is None else text


def _safe(name: str) -> str:
    return name[:40].encode("ascii", "backslashreplace").decode()


def _refuse(message: str, param: str | None = None, code: str | None = None) -> NoReturn:
    raise ApiError(400, message, param=param, code=code)


def openapi() -> dict[str, Any]:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanochat", "version": "1"},
        "paths": {
            "/health": _get("Whether the server can answer."),
            "/stats": _get("What is loaded and what goes on."),
            "/metrics": _get("The same for Prometheus.", "text/plain"),
            "/openapi.json": _get("This document."),
            "/v1/models": _get("The model."),
            "/chat/completions": _post("Stream an answer.", _chat(), ["text/event-stream"]),
            "/v1/chat/completions": _post(
                "OpenAI's protocol.", _completion(), ["application/json", "text/event-stream"]
            ),
        },
        "components": {"schemas": {"Error": _error(), "Message": _message_schema()}},
    }


def _get(about: str, kind: str = "application/json") -> dict[str, Any]:
    return {"get": {"summary": about, "responses": {"200": _content(about, kind)} | _errors()}}


def _post(about: str, schema: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    answers = {"description": about, "content": {kind: {} for kind in kinds}}
    taken = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"summary": about, "requestBody": taken, "responses": {"200": answers} | _errors()}}


def _content(about: str, kind: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": about, "content": {kind: {"schema": schema} if schema else {}}}


def _errors() -> dict[str, Any]:
    return {"default": _content("An error.", "application/json", {"$ref": "#/components/schemas/Error"})}


def _number_schema(name: str) -> dict[str, Any]:
    low, high, whole, default, about = NUMBERS[name]
    found = {"type": ["integer" if whole else "number", "null"], "minimum": low, "maximum": high, "description": about}
    return found | ({} if default is None else {"default": default})


def _chat() -> dict[str, Any]:
    names = ("temperature", "top_k", "max_tokens", "seed")
    return _object_schema({"messages": _messages()} | {name: _number_schema(name) for name in names}, ["messages"])


def _completion() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    more = {
        "model": {"type": "string"},
        "n": _number_schema("n"),
        "max_completion_tokens": _number_schema("max_tokens"),
        "stream": {"type": "boolean"},
        "stream_options": _object_schema({"include_usage": {"type": "boolean"}}),
        "stop": {"anyOf": [text, {"type": "array", "items": text, "maxItems": MAX_STOPS}]},
        "user": {"type": "string"},
    }
    schema = _chat()
    return schema | {"properties": schema["properties"] | more}


def _messages() -> dict[str, Any]:
    items = {"$ref": "#/components/schemas/Message"}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_MESSAGES}


def _message_schema() -> dict[str, Any]:
    text = {"type": "string", "maxLength": MAX_MESSAGE_CHARS}
    part = _object_schema({"type": {"enum": list(PART_TYPES)}, "text": text}, ["type", "text"])
    content = {"anyOf": [text | {"minLength": 1}, {"type": "array", "items": part, "minItems": 1}]}
    return _object_schema({"role": {"enum": ["system", "user", "assistant"]}, "content": content}, ["role", "content"])


def _error() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    error = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": nullable}
    return {
        "type": "object",
        "properties": {"error": _object_schema(error, ["message", "type"])},
        "required": ["error"],
    }


def _object_schema(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


DELTA_TYPES = {"text": "text", "python": "python", "output": "python_output"}  # a piece's kind -> a part's type
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # str.splitlines() cuts here
END_OF_STREAM = b"data: [DONE]\n\n"


class Delta(NamedTuple):
    """A bit of an answer: as `conversation.Piece`."""

    kind: str
    text: str


class Header(NamedTuple):
    """What all objects of one of OpenAI's answers share."""

    id: str
    created: int
    model: str


def event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event that carries `value`: one line, whatever the client takes for a line end."""
    line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + line.translate(LINE_ENDS).encode() + b"\n\n"


def merge(pieces: Iterable[tuple[str, str]]) -> list[Delta]:
    """Return the pieces with neighbours of one kind joined."""
    merged: list[tuple[str, list[str]]] = []
    for kind, text in pieces:
        if not merged or merged[-1][0] != kind:
            merged.append((kind, []))
        merged[-1][1].append(text)
    return [Delta(kind, "".join(texts)) for kind, texts in merged]


def token(piece: tuple[str, str], gpu: int) -> dict[str, Any]:
    """Return a piece in our own dialect; the kind of plain text is left out."""
    kind, text = piece
    return {"token": text, "gpu": gpu} | ({} if kind == "text" else {"kind": kind})


def parts(pieces: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Return pieces as parts of a message."""
    return [{"type": DELTA_TYPES[kind], "text": text} for kind, text in pieces]


def delta(piece: tuple[str, str]) -> dict[str, Any]:
    """Return a piece as the delta of one of OpenAI's chunks."""
    kind, text = piece
    return {"content": text} if kind == "text" else {"nanochat_parts": parts([piece])}


def chunk(header: Header, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """Return a chunk of a streamed answer: of the `index`-th choice, with `finish` on its last."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**_common(header, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(header: Header, usage: dict[str, int]) -> dict[str, Any]:
    """Return the chunk that ends a stream for which the client asked for token counts."""
    return {**_common(header, "chat.completion.chunk"), "choices": [], "usage": usage}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return token counts as OpenAI words them. The tokens of tools and of the end of an answer count as well."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def whole(
    header: Header, choices: Sequence[tuple[Sequence[tuple[str, str]], str]], usage: dict[str, int]
) -> dict[str, Any]:
    """Return a whole answer: of each choice its pieces and the reason why it ended."""
    listed = []
    for index, (pieces, finish) in enumerate(choices):
        merged = merge(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        message["content"] = "".join(piece.text for piece in merged if piece.kind == "text")
        if any(piece.kind != "text" for piece in merged):
            message["nanochat_parts"] = parts(merged)
        listed.append({"index": index, "message": message, "logprobs": None, "finish_reason": finish})
    return {**_common(header, "chat.completion"), "choices": listed, "usage": usage}


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the list of models."""
    listed = [{"id": name, "object": "model", "created": created, "owned_by": "nanochat"} for name in names]
    return {"object": "list", "data": listed}


def _common(header: Header, kind: str) -> dict[str, Any]:
    return {"id": header.id, "object": kind, "created": header.created, "model": header.model}


class StopSequenceFilter:
    """Ends an answer before the first of some texts, which may come in bits: what may become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, pieces: Sequence[tuple[str, str]]) -> list[Delta]:
        """Return what of these pieces can go out; nothing once `stopped`. A tool's pieces are not looked into."""
        found: list[Delta] = []
        for kind, text in pieces:
            if self.stopped:
                break
            if kind != "text":
                found += [*self.close(), Delta(kind, text)]
                continue
            text = self._held + text
            at = min((i for i in map(text.find, self._stops) if i >= 0), default=None)
            self.stopped = at is not None
            keep = (
                at
                if at is not None
                else len(text) - max((_partial_match_len(text, stop) for stop in self._stops), default=0)
            )
            self._held = "" if self.stopped else text[keep:]
            found += [Delta("text", text[:keep])] if keep else []
        return found

    def close(self) -> list[Delta]:
        """Return what was held back: no stop came of it."""
        held, self._held = self._held, ""
        return [Delta("text", held)] if held and not self.stopped else []


def _partial_match_len(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
