"""The HTTP API's requests, responses and errors as pydantic models, from which FastAPI generates the OpenAPI document.

Two dialects: our own (`ChatRequest`) and OpenAI's (`CompletionRequest`), which refuses what this server does not
support and what would change an answer: a parameter ignored in silence would mislead the client. Tool calls go into the
field `nanochat_parts`: a client that sends a message back as it came gives the model its own tool calls again.
"""

import collections
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, to_json

from nanochat.config import nearest
from nanochat.data import chat_format
from nanochat.data.chat_format import Piece

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CHARS = 32_000
MAX_BODY_BYTES = 2**20  # 32,000 characters, each of them two escapes of six bytes, and 500 messages around them
MAX_ANSWER_TOKENS = 4096
MAX_STOPS = 4
MAX_STOP_CHARS = 256
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # str.splitlines() splits here


# Errors


class ErrorDetail(BaseModel):
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class ApiError(HTTPException):
    """A refusal in OpenAI's form, on all routes and within streams."""

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None, **detail: Any) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = ErrorResponse(error=ErrorDetail(message=message, **detail))


def server_error(message: str) -> ApiError:
    return ApiError(500, message, type="server_error")


UNSUPPORTED = "unsupported_parameter"
MESSAGES = {
    UNSUPPORTED: "{name} is not supported{hint}",
    "missing": "{name} is missing",
    "too_short": "{name} is empty",
    "too_long": "{name} has {actual_length:,} items: at most {max_length:,} are allowed",
    "greater_than_equal": "{name} is {value}, expected a number {expected}",
    "less_than_equal": "{name} is {value}, expected a number {expected}",
    "model_attributes_type": "{name} is {value}, expected an object",
}


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the first of pydantic's errors as a 400 that names the parameter."""
    error = errors[0]
    kind, context = error["type"], error.get("ctx", {})
    path = [*error["loc"][1:], *([context["unknown"]] if "unknown" in context else [])]  # after "body"
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".") or None
    expected = error["msg"].removeprefix("Input should be ")
    message = MESSAGES.get(kind, "{name} is {value}, expected {expected}").format(
        **context | {"name": param or "the body", "value": _shown(error["input"]), "expected": expected}
    )
    return ApiError(400, message, param=param, code=UNSUPPORTED if kind == UNSUPPORTED else None)


def _shown(value: Any) -> str:
    """Return a value for a message: short, and without walking into what may be deeply nested."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value[:40] if isinstance(value, str) else value)[:300]


def _refuse(param: str, message: str) -> NoReturn:
    raise ApiError(400, f"{param} {message}", param=param)


# Requests


class Strict(BaseModel):
    """Refuses unknown names and values of another type. null stands for absent; 5.0 is an integer, as JSON has it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value:
            if name not in cls.model_fields and value[name] is not None:
                name = name[:40].encode("ascii", "backslashreplace").decode()
                hint = nearest(name, cls.model_fields)
                raise PydanticCustomError(UNSUPPORTED, "not supported", {"unknown": name, "hint": hint})
        return {
            name: int(item) if isinstance(item, float) and item.is_integer() else item
            for name, item in value.items()
            if item is not None
        }


class MessageField(Strict):
    """An unknown name with an empty value (`"tool_calls": []`, `"refusal": ""`) stands for an absent one, too."""

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: x for name, x in value.items() if name in cls.model_fields or x not in chat_format.EMPTY}


class Part(MessageField):
    type: Literal["text", "python", "python_output"]
    text: str
    cache_control: Any = Field(None, exclude=True)  # changes no answer


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("content_type", "a string or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class Message(MessageField):
    """A message. Limits: 8,000 characters a message, 32,000 in all."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    nanochat_parts: list[Part] | None = Field(None, description="Replaces the content of an assistant's message.")
    type: Literal["text", "message"] | None = None
    name: Any = Field(None, description="Has no effect.")
    annotations: Any = Field(None, description="Has no effect.")


def _check_messages(messages: list[Message]) -> list[Message]:
    """Check what neither types nor `chat_format.normalize` do."""
    total = 0
    for number, message in enumerate(messages):
        param = f"messages[{number}].{'content' if message.nanochat_parts is None else 'nanochat_parts'}"
        if message.nanochat_parts is not None and message.role != "assistant":
            _refuse(param, "is for the assistant's messages")
        if message.content is None and message.nanochat_parts is None:
            _refuse(param, "is missing")
        text = "".join(part.text for part in message.nanochat_parts or message.content or ())
        if not text and message.role == "user":
            _refuse(param, "is empty")
        if text.encode("utf-8", "replace").decode() != text:
            _refuse(param, "has half of a surrogate pair, which is not a character")
        if len(text) > MAX_MESSAGE_CHARS:
            _refuse(param, f"has {len(text):,} characters: at most {MAX_MESSAGE_CHARS:,} are allowed")
        total += len(text)
    if total > MAX_CHARS:
        _refuse("messages", f"have {total:,} characters: at most {MAX_CHARS:,} in all are allowed")
    return messages


class ChatRequest(Strict):
    """A request of our own dialect."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_messages)]
    temperature: float = Field(0.8, ge=0, le=2, description="0 takes the most likely token.")
    top_k: int = Field(50, ge=0, le=200, description="Sample among the k most likely tokens; 0: among all.")
    max_tokens: int = Field(512, ge=1, description="An answer ends at 4,096 tokens and where the context does, too.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(None, description="Default: random.")

    @property
    def token_limit(self) -> int:
        return min(self.max_tokens, MAX_ANSWER_TOKENS)


def _unsupported(*values: Any) -> AfterValidator:
    """Accept only the values that ask for nothing."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(other) and value == other for other in values):  # True is not 1
            raise PydanticCustomError(UNSUPPORTED, "not supported", {"hint": ": leave it out"})
        return value

    return AfterValidator(check)


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "a string or a list of up to {limit} strings", {"limit": MAX_STOPS})
    if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError("stop", "strings of 1 to {limit} characters", {"limit": MAX_STOP_CHARS})
    return stops


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Any = None


class CompletionRequest(ChatRequest):
    """A request of OpenAI's dialect."""

    model: str | None = None
    n: int = Field(1, ge=1, le=8, description="Number of answers.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_stops, json_schema_input_type=str | list[str])] = []
    # Accepted whatever their value: they change no answer here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    # Not supported: accepted with the value that asks for nothing.
    top_p: Annotated[Any, _unsupported(1)] = None
    frequency_penalty: Annotated[Any, _unsupported(0)] = None
    presence_penalty: Annotated[Any, _unsupported(0)] = None
    logit_bias: Annotated[Any, _unsupported({})] = None
    logprobs: Annotated[Any, _unsupported(False)] = None
    top_logprobs: Annotated[Any, _unsupported(0)] = None
    tools: Annotated[Any, _unsupported([])] = None
    tool_choice: Annotated[Any, _unsupported("none", "auto")] = None
    functions: Annotated[Any, _unsupported([])] = None
    function_call: Annotated[Any, _unsupported("none", "auto")] = None
    response_format: Annotated[Any, _unsupported({"type": "text"})] = None
    modalities: Annotated[Any, _unsupported(["text"])] = None

    @property
    def token_limit(self) -> int:
        return min(self.max_completion_tokens or self.max_tokens, MAX_ANSWER_TOKENS)

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.stream_options and not self.stream:
            _refuse("stream_options", "is for streams: set stream to true")
        if {"max_tokens", "max_completion_tokens"} <= self.model_fields_set and (
            self.max_tokens != self.max_completion_tokens
        ):
            _refuse("max_completion_tokens", "differs from max_tokens: give one of them")
        return self


def decode(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`: in UTF-8, without duplicate keys, NaN and Infinity, not nested too deeply."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
        if isinstance(value, dict):
            return value
        problem = f"is {_shown(value)}, expected a JSON object"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte {error.start} is {body[error.start]:#04x}"
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError as error:
        problem = f"is not valid JSON: {error}"
    raise ApiError(400, f"the body {problem}", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(name for name, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"duplicate key {_shown(counts.most_common(1)[0][0])}")
    return dict(pairs)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def conversation(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return checked messages as `chat_format.prompt` takes them."""
    both = [(message.role, message.nanochat_parts or message.content or []) for message in messages]
    return [{"role": role, "content": [part.model_dump() for part in parts]} for role, parts in both]


# Responses


def event(value: BaseModel | Mapping[str, Any]) -> bytes:
    """Return a server-sent event: one line, whatever the client takes for a line end."""
    return f"data: {to_json(value).decode().translate(LINE_ENDS)}\n\n".encode()


class Usage(BaseModel):
    """Token counts; those of tool calls and of the end of an answer count as well."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    nanochat_parts: list[Part] | None = Field(default=None, exclude_if=lambda parts: parts is None)


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


def merge(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the pieces with neighbors of the same kind joined."""
    groups = itertools.groupby(pieces, key=lambda piece: piece.kind)
    return [Piece(kind, "".join(piece.text for piece in group)) for kind, group in groups]


def token_event(piece: Piece, gpu: int) -> dict[str, Any]:
    """Return a piece in our own dialect."""
    return {"token": piece.text, "gpu": gpu} | ({} if piece.kind == "text" else {"kind": piece.kind})


def parts(pieces: Iterable[Piece]) -> list[Part]:
    types = {"text": "text", "python": "python", "output": "python_output"}
    return [Part.model_validate({"type": types[kind], "text": text}) for kind, text in pieces]


def delta(piece: Piece) -> dict[str, Any]:
    """Return a piece as OpenAI's delta."""
    return {"content": piece.text} if piece.kind == "text" else {"nanochat_parts": parts([piece])}


def assistant_message(pieces: Iterable[Piece]) -> AssistantMessage:
    merged = merge(pieces)
    return AssistantMessage(
        content="".join(text for kind, text in merged if kind == "text"),
        nanochat_parts=parts(merged) if any(kind != "text" for kind, _ in merged) else None,
    )
