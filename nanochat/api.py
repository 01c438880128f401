"""The HTTP API's requests: JSON checked into frozen values, or refused with a clear error. Pure: bytes in, values out.

Two dialects. Our own (`chat`) is four sampling parameters and a stream of pieces; OpenAI's (`completion`) accepts what
this model can do, accepts what changes nothing, and refuses the rest: a parameter that is ignored in silence would make
the client believe in an answer that it did not get. Every error has OpenAI's shape, on every route.
"""

import json
from collections.abc import Mapping
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
