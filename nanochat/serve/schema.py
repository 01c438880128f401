"""The HTTP API's requests, responses and errors as pydantic models, from which FastAPI generates the OpenAPI document.

Two dialects: our own (`ChatRequest`) and OpenAI's (`CompletionRequest` for chats, `TextCompletionRequest`). Fields that
ask for nothing are accepted; what this server does not support and what would change an answer is refused: a parameter
ignored in silence would mislead the client. Tool calls go into the field `nanochat_parts`, unless the request declares
the tool: a client that sends a message back as it came gives the model its own tool calls again.
"""

import collections
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError, to_json

from nanochat.config import nearest
from nanochat.data import chat_format
from nanochat.data.chat_format import Piece

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_CHARS = 32_000
MAX_BODY_BYTES = 2**20  # 32,000 characters, each of them two escapes of six bytes, and 500 messages around them
MAX_ANSWER_TOKENS = 4096
MAX_STOPS, MAX_COMPLETION_STOPS = 4, 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20  # alternatives of a token
MAX_CHOICES = 128  # prompts of a request times answers to each
CALCULATOR = "calculator"  # the name under which the model's only tool can be declared
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


def refuse(param: str, message: str) -> NoReturn:
    """Raise a 400 that names the parameter."""
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


MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "audio_url", "video", "video_url", "file")


class Part(MessageField):
    type: Literal["text", "python", "python_output"]
    text: str
    cache_control: Any = Field(None, exclude=True)  # changes no answer

    @model_validator(mode="before")
    @classmethod
    def _refuse_media(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in MEDIA:
            hint = f": the model reads text only, no {value['type']}"
            raise PydanticCustomError(UNSUPPORTED, "not supported", {"unknown": "type", "hint": hint})
        return value


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("content_type", "a string or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class FunctionCall(MessageField):
    name: str
    arguments: str = Field(description="A JSON object.")


class ToolCall(MessageField):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Any = Field(default=None, exclude=True)


class Message(MessageField):
    """A message. Limits: 8,000 characters a message, 32,000 in all."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = Field(None, description="Of the assistant: calls that `tool` messages answer.")
    tool_call_id: str | None = Field(None, description="Of a tool's message: the call that it answers.")
    nanochat_parts: list[Part] | None = Field(None, description="Replaces the content of an assistant's message.")
    type: Literal["text", "message"] | None = None
    name: Any = Field(None, description="Has no effect.")
    annotations: Any = Field(None, description="Has no effect.")


def check_text(param: str, text: str) -> None:
    if text.encode("utf-8", "replace").decode() != text:
        refuse(param, "has half of a surrogate pair, which is not a character")


def _check_messages(messages: list[Message]) -> list[Message]:
    """Check what neither types nor `chat_format.normalize` do."""
    total = 0
    for number, message in enumerate(messages):
        param = f"messages[{number}].{'content' if message.nanochat_parts is None else 'nanochat_parts'}"
        if message.nanochat_parts is not None and message.role != "assistant":
            refuse(param, "is for the assistant's messages")
        if message.tool_calls and message.role != "assistant":
            refuse(f"messages[{number}].tool_calls", "is for the assistant's messages")
        if message.content is None and message.nanochat_parts is None and not message.tool_calls:
            refuse(param, "is missing")
        text = "".join(part.text for part in message.nanochat_parts or message.content or ())
        text += "".join(call.function.arguments for call in message.tool_calls or ())
        if not text and message.role == "user":
            refuse(param, "is empty")
        check_text(param, text)
        if len(text) > MAX_MESSAGE_CHARS:
            refuse(param, f"has {len(text):,} characters: at most {MAX_MESSAGE_CHARS:,} are allowed")
        total += len(text)
    if total > MAX_CHARS:
        refuse("messages", f"have {total:,} characters: at most {MAX_CHARS:,} in all are allowed")
    return messages


Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingRequest(Strict):
    """How to draw tokens. Some defaults are settings of the server; GET /stats shows them."""

    temperature: float = Field(0.8, ge=0, le=2, description="0 takes the most likely token.")
    top_k: int = Field(50, ge=0, le=200, description="Sample among the k most likely tokens; 0: among all.")
    top_p: float = Field(1.0, ge=0, le=1, description="Sample among the most likely tokens of this probability mass.")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability, as a fraction of the most likely token's.")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="Of tokens of the prompt and the answer.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Of tokens that the answer has.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Of tokens of the answer, for each time.")
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_LOGIT_BIAS)] = {}
    max_tokens: int = Field(512, ge=1, description="An answer ends at 4,096 tokens and where the context does, too.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(None, description="Default: random.")

    @property
    def token_limit(self) -> int:
        return min(self.max_tokens, MAX_ANSWER_TOKENS)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_messages)]


class ChatRequest(SamplingRequest):
    """A request of our own dialect."""

    model: str | None = None
    messages: Messages


def _unsupported(*values: Any) -> AfterValidator:
    """Accept only the values that ask for nothing."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(other) and value == other for other in values):  # True is not 1
            raise PydanticCustomError(UNSUPPORTED, "not supported", {"hint": ": leave it out"})
        return value

    return AfterValidator(check)


# Fields of OpenAI, vLLM and llama.cpp that change no answer here, whatever their value.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "cache_prompt", "request_id", "priority", "spaces_between_special_tokens"),
)
# Those that are not supported -> the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **{"functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": ()},
    **{"web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",), "length_penalty": (1,)},
    **{"use_beam_search": (False,), "ignore_eos": (False,), "min_tokens": (0,), "stop_token_ids": ([],)},
    **{"bad_words": ([],), "include_stop_str_in_output": (False,), "skip_special_tokens": (True,)},
    **{"truncate_prompt_tokens": (), "prompt_logprobs": (), "allowed_token_ids": (), "chat_template": ()},
    **{"chat_template_kwargs": ({},), "documents": ([],), "add_generation_prompt": (True,), "detokenize": (True,)},
    **{"continue_final_message": (False,), "return_token_ids": (False,), "return_tokens_as_token_ids": (False,)},
    **{"guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": ({},)},
    **{"grammar": ("",), "json_schema": ({},), "mirostat": (0,), "typical_p": (1,), "tfs_z": (1,), "n_probs": (0,)},
    **{"repeat_penalty": (1,), "dynatemp_range": (0,), "xtc_probability": (0,), "dry_multiplier": (0,)},
    **{"n_keep": (0,), "min_keep": (0,), "id_slot": (-1,), "timings_per_token": (False,), "return_tokens": (False,)},
    **{"post_sampling_probs": (False,), "lora": ([],), "samplers": (), "do_sample": (True,)},
}
_fields: dict[str, Any] = {name: (Any, None) for name in IGNORED}
_fields |= {name: (Annotated[Any, _unsupported(*values)], None) for name, values in NEUTRAL.items()}
_ForeignFields: Any = create_model("_ForeignFields", __base__=Strict, **_fields)


def _stops(limit: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > limit or not all(isinstance(stop, str) for stop in stops):
            raise PydanticCustomError("stop", "a string or a list of up to {limit} strings", {"limit": limit})
        if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise PydanticCustomError("stop", "strings of 1 to {limit} characters", {"limit": MAX_STOP_CHARS})
        return stops

    return BeforeValidator(check, json_schema_input_type=str | list[str])


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Any = None
    continuous_usage_stats: Annotated[Any, _unsupported(False)] = None


class OpenAIRequest(SamplingRequest, _ForeignFields):
    """What requests of OpenAI's dialect have in common."""

    model: str | None = None
    n: int = Field(1, ge=1, le=8, description="Number of answers.")
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_are_for_streams(self) -> Any:
        if self.stream_options and not self.stream:
            refuse("stream_options", "is for streams: set stream to true")
        return self


def _json_schema(value: Any) -> dict[str, Any] | None:
    """Return the JSON schema of an answer, as OpenAI's or llama.cpp's clients write it; None for text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    schema: Any = value.get("schema", {"type": "object"}) if kind == "json_object" else None
    if kind == "json_schema":
        holder = value.get("json_schema", value)
        schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict):
        raise PydanticCustomError("response_format", "the type text, json_object, or json_schema with its schema")
    return schema


ResponseFormat = Annotated[dict[str, Any] | None, BeforeValidator(_json_schema, json_schema_input_type=dict[str, Any])]


class Function(MessageField):
    name: str
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: Any = None

    @property
    def argument(self) -> str | None:
        """The name of the argument that takes the expression; None if that is not clear."""
        properties, required = self.parameters.get("properties"), self.parameters.get("required")
        names = list(properties) if isinstance(properties, dict) else []
        needed = [name for name in names if name in required] if isinstance(required, list) else []
        candidates = needed or names or ["expression"]
        return candidates[0] if len(candidates) == 1 else "expression" if "expression" in names and not needed else None


class Tool(MessageField):
    type: Literal["function"]
    function: Function


def _tool_choice(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        value = value["function"].get("name")
        if value in ("none", "auto", "required"):  # no function of a client
            value = None
    if not isinstance(value, str):
        raise PydanticCustomError("tool_choice", "'none', 'auto', 'required' or a declared function")
    return value


class CompletionRequest(OpenAIRequest):
    """A request of OpenAI's dialect for an answer in a chat."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[str], _stops(MAX_STOPS)] = []
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: Annotated[str, BeforeValidator(_tool_choice, json_schema_input_type=str | dict[str, Any])] = Field(
        "auto", description="With a tool, auto and required end the answer at a call; none leaves calls to the server."
    )
    response_format: ResponseFormat = None
    echo: Annotated[Any, _unsupported(False)] = None

    @property
    def token_limit(self) -> int:
        return min(self.max_completion_tokens or self.max_tokens, MAX_ANSWER_TOKENS)

    @property
    def tool(self) -> Function | None:
        """The declared tool whose calls are returned; None: the server answers them itself."""
        return self.tools[0].function if self.tools and self.tool_choice != "none" else None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if {"max_tokens", "max_completion_tokens"} <= self.model_fields_set and (
            self.max_tokens != self.max_completion_tokens
        ):
            refuse("max_completion_tokens", "differs from max_tokens: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            refuse("top_logprobs", "is for log-probabilities: set logprobs to true")
        if self.tool_choice not in ("none", "auto", "required", CALCULATOR):
            refuse("tool_choice", f"is {_shown(self.tool_choice)}, expected 'none', 'auto', 'required' or a tool")
        if self.tool_choice not in ("none", "auto") and not self.tools:
            refuse("tool_choice", "needs tools: declare the tool")
        if self.tool and self.response_format is not None:
            refuse("response_format", "is not for requests with tools: the answer would not be a call")
        for tool in self.tools if self.tool_choice != "none" else ():
            name = tool.function.name
            if name != CALCULATOR or len(self.tools) > 1:
                problem = "only once" if name == CALCULATOR else f"only {CALCULATOR}, not {_shown(name)}"
                refuse("tools", f"is not supported for this: the model can call {problem}")
            if tool.function.argument is None:
                refuse("tools", f"is not supported for this: {CALCULATOR} takes one argument, the expression")
        return self


def _prompts(value: Any) -> Any:
    """Return a list of prompts, each a string or token ids."""
    many = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(many, list) or not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in many):
        raise PydanticCustomError("prompt", "a string, token ids, or a list of them")
    if not many:
        raise PydanticCustomError("too_short", "")
    return many


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


Prompt = str | list[int]


class TextCompletionRequest(OpenAIRequest):
    """A request of OpenAI's dialect to continue texts or token ids; <|bos|> is put before those that do not have it."""

    prompt: Annotated[
        list[Prompt], BeforeValidator(_prompts, json_schema_input_type=Prompt | list[Prompt]), Field(max_length=128)
    ]
    max_tokens: int = Field(16, ge=0)
    best_of: int | None = Field(None, ge=1, le=8, description="Answers, of which the n most likely are returned.")
    echo: bool = Field(False, description="Return the prompt as well, with logprobs its log-probabilities.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stop: Annotated[list[str], _stops(MAX_COMPLETION_STOPS)] = []
    add_special_tokens: bool = Field(True, description="Put <|bos|> before the prompt: the model was trained with it.")
    suffix: Annotated[Any, _unsupported("")] = None
    response_format: ResponseFormat = None

    @model_validator(mode="after")
    def _consistent(self) -> "TextCompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            refuse("max_tokens", "is 0, expected a number greater than or equal to 1, or echo")
        if self.best_of is not None and self.best_of < self.n:
            refuse("best_of", f"is {self.best_of}, expected at least n, {self.n}")
        if self.stream and (self.best_of or self.n) > self.n:
            refuse("best_of", "is not for streams: the best are known at the end")
        if (choices := len(self.prompt) * (self.best_of or self.n)) > MAX_CHOICES:
            refuse("prompt", f"asks for {choices} answers: at most {MAX_CHOICES} in a request are allowed")
        return self


class TokenizeRequest(Strict):
    """A text, or a conversation, to encode: the prompt of a special token's name gives its id."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = Field(True, description="Put <|bos|> before the prompt.")
    add_generation_prompt: bool = Field(True, description="End with <|assistant_start|>.")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            refuse("prompt", "or messages: give one of them")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int]


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
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=lambda calls: calls is None)
    nanochat_parts: list[Part] | None = Field(default=None, exclude_if=lambda parts: parts is None)


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Of each token; a token that is no text is written `bytes:` and its bytes."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


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
