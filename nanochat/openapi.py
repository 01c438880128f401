"""The description of the HTTP API (OpenAPI 3.1), from the same numbers that requests are checked with."""

from typing import Any

from nanochat.api import MAX_MESSAGE_CHARS, MAX_MESSAGES, MAX_STOP_CHARS, MAX_STOPS, NUMBERS, PART_TYPES


def document() -> dict[str, Any]:
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
        "components": {"schemas": {"Error": _error(), "Message": _message()}},
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


def _number(name: str) -> dict[str, Any]:
    low, high, whole, default, about = NUMBERS[name]
    found = {"type": ["integer" if whole else "number", "null"], "minimum": low, "maximum": high, "description": about}
    return found | ({} if default is None else {"default": default})


def _chat() -> dict[str, Any]:
    names = ("temperature", "top_k", "max_tokens", "seed")
    return _object({"messages": _messages()} | {name: _number(name) for name in names}, ["messages"])


def _completion() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    more = {
        "model": {"type": "string"},
        "n": _number("n"),
        "max_completion_tokens": _number("max_tokens"),
        "stream": {"type": "boolean"},
        "stream_options": _object({"include_usage": {"type": "boolean"}}),
        "stop": {"anyOf": [text, {"type": "array", "items": text, "maxItems": MAX_STOPS}]},
        "user": {"type": "string"},
    }
    schema = _chat()
    return schema | {"properties": schema["properties"] | more}


def _messages() -> dict[str, Any]:
    items = {"$ref": "#/components/schemas/Message"}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_MESSAGES}


def _message() -> dict[str, Any]:
    text = {"type": "string", "maxLength": MAX_MESSAGE_CHARS}
    part = _object({"type": {"enum": list(PART_TYPES)}, "text": text}, ["type", "text"])
    content = {"anyOf": [text | {"minLength": 1}, {"type": "array", "items": part, "minItems": 1}]}
    return _object({"role": {"enum": ["system", "user", "assistant"]}, "content": content}, ["role", "content"])


def _error() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    error = {"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": nullable}
    return {"type": "object", "properties": {"error": _object(error, ["message", "type"])}, "required": ["error"]}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})
