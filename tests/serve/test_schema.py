"""The API's requests and responses: what is refused, with which message, and how an answer is written."""

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from nanochat.serve import schema
from nanochat.serve.api import chat
from nanochat.serve.schema import ApiError, ChatRequest, CompletionRequest, ErrorDetail, Strict, TextCompletionRequest

HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}}
CALLED = {"role": "assistant", "content": "It is ", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"properties": {"expression": {}}}}}


def parse(model: type[Strict], body: Any) -> Any:
    """Validate as FastAPI does."""
    try:
        return TypeAdapter(model).validate_python(body, from_attributes=True)
    except ValidationError as error:
        raise schema.validation_error([item | {"loc": ("body", *item["loc"])} for item in error.errors()]) from None


def refusal(model: type[Strict], body: Any) -> ErrorDetail:
    with pytest.raises(ApiError) as caught:
        parse(model, body)
    assert caught.value.status_code == 400
    return caught.value.body.error


def content(messages: list[Any]) -> list[Any]:
    return [message["content"] for message in chat.conversation(parse(ChatRequest, {"messages": messages}).messages)]


def test_defaults_and_null() -> None:
    request = parse(ChatRequest, {"messages": HI})
    assert (request.temperature, request.top_k, request.token_limit, request.seed) == (0.8, 50, 512, None)
    assert chat.conversation(request.messages) == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    request = parse(CompletionRequest, {"messages": HI, "temperature": None, "stop": None, "n": None})
    assert request == parse(CompletionRequest, {"messages": HI}) and (request.n, request.stream) == (1, False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "a list, expected a JSON object"),
        (b"null", "null, expected a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7 is 0xff"),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"a": 1, "b": 2, "a": 3}', 'duplicate key "a"'),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ("\ufeff{}".encode(), "not valid JSON"),
    ],
)
def test_bodies_other_than_a_strict_json_object_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        schema.decode(body)
    error = caught.value.body.error
    assert message in error.message and error.code == "invalid_json" and len(error.message) < 200


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (None, "messages", "messages is missing"),
        ([], "messages", "messages is empty"),
        ("hi", "messages", 'messages is "hi", expected a valid list'),
        (HI * 501, "messages", "501 items: at most 500"),
        (["hi"], "messages[0]", "expected an object"),
        ([{"role": "user"}], "messages[0].content", "content is missing"),
        ([{"role": "user", "content": []}], "messages[0].content", "content is empty"),
        ([{"role": "user", "content": 5}], "messages[0].content", "is 5, expected a string or a list of parts"),
        ([{"role": "user", "content": {}}], "messages[0].content", "is an object, expected"),
        ([{"role": "user", "content": "x" * 8001}], "messages[0].content", "8,001 characters: at most 8,000"),
        ([{"role": "user", "content": "x" * 8000}] * 5, "messages", "40,000 characters: at most 32,000"),
        ([{"role": "robot", "content": "x"}], "messages[0].role", "role is \"robot\", expected 'system', 'developer'"),
        ([*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls[0].function", "missing"),
        ([HI[0] | {"tool_calls": [CALL]}], "messages[0].tool_calls", "assistant's messages"),
        ([*HI, {"role": "assistant", "content": None, "refusal": "no"}], "messages[1].refusal", "not supported"),
        ([*HI, {"role": "assistant", "content": None}], "messages[1].content", "is missing"),
        (
            [{"role": "user", "content": "x", "type": "function_call"}],
            "messages[0].type",
            "expected 'text' or 'message'",
        ),
        ([{"role": "user", "content": ""}], "messages[0].content", "content is empty"),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content", "surrogate"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "messages[0].content[0].type", "image"),
        ([{"role": "user", "nanochat_parts": []}], "messages[0].nanochat_parts", "assistant's messages"),
    ],
)
def test_wrong_messages_are_refused_by_name(messages: Any, param: str, message: str) -> None:
    error = refusal(ChatRequest, {"messages": messages})
    assert error.param == param and message in error.message and len(error.message) < 300


@pytest.mark.parametrize(
    "extra",
    [
        {"type": "text"},
        {"type": "message"},
        {"name": "Bob"},
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []},
        {"refusal": "", "provider_specific_fields": {}, "reasoning_content": None},
        {"content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "annotations": []}]},
    ],
)
def test_fields_of_a_message_that_say_nothing_are_accepted(extra: dict[str, Any]) -> None:
    assert content([HI[0] | extra]) == [[{"type": "text", "text": "hi"}]]


def test_the_largest_conversation_is_accepted() -> None:
    assert len(content([{"role": "user", "content": "é" * 8000}] * 4)) == 4
    assert len(content([{"role": "user", "content": "x"}] * 500)) == 500
    body = json.dumps({"messages": [{"role": "user", "content": "😀" * 8000}] * 4})
    assert len(body) < schema.MAX_BODY_BYTES
    parse(ChatRequest, schema.decode(body.encode()))


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("temperature", (0, 2, 1.5), (-0.1, 2.1, True, "0.5", [], {}, 10**20, float("inf"))),
        ("top_k", (0, 200, 5.0), (-1, 201, 1.5, False, "5")),
        ("max_tokens", (1, 4096, 10**9), (0, -1)),
        ("seed", (0, -(2**63), 2**63 - 1), (2**63, -(2**63) - 1, 0.5)),
    ],
)
def test_numbers_have_bounds_and_strict_types(name: str, accepted: tuple[Any], refused: tuple[Any]) -> None:
    for value in accepted:
        assert getattr(parse(CompletionRequest, {"messages": HI, name: value}), name) == value
    for value in refused:
        error = refusal(CompletionRequest, {"messages": HI, name: value})
        assert error.param == name and error.message.startswith(f"{name} is ") and ", expected a " in error.message


def test_unknown_parameters_are_refused_and_the_nearest_is_named() -> None:
    error = refusal(ChatRequest, {"messages": [], "max_token": 5})
    assert error.message == "max_token is not supported; did you mean max_tokens?"
    assert (error.param, error.code) == ("max_token", "unsupported_parameter")
    assert refusal(ChatRequest, {"messages": HI, "a\ud800": 5}).param == "a\\ud800"
    assert refusal(ChatRequest, {"messages": HI, "n": 1}).param == "n"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "search"}}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "calculator", "parameters": {"properties": {"a": 1, "b": 2}}},
                    }
                ]
            },
            "tools",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "search"}}}, "tool_choice"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": "x" * 257}, "stop"),
    ],
)
def test_openai_parameters_that_are_not_supported_are_refused(body: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, {"messages": HI, **body}).param == param


def test_openai_parameters_that_change_nothing_are_accepted() -> None:
    harmless = {
        **{"user": "u", "metadata": {"a": "b"}, "store": False, "top_p": 1.0, "presence_penalty": 0, "logprobs": False},
        **{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "stop": None},
        **{"ignore_eos": False, "skip_special_tokens": True, "min_tokens": 0, "length_penalty": 1.0, "bad_words": []},
        **{"unknown": None, "mirostat": 0, "cache_prompt": True, "echo": False, "reasoning_effort": None},
    }
    parse(CompletionRequest, {"messages": HI, **harmless})
    request = parse(
        CompletionRequest,
        {"messages": HI, "n": 3, "max_completion_tokens": 7, "stop": "a", "model": "m", "stream": True},
    )
    assert (request.n, request.token_limit, request.stop, request.model, request.stream) == (3, 7, ["a"], "m", True)
    for name in ("max_tokens", "max_completion_tokens"):  # clients ask for more than is generated
        assert parse(CompletionRequest, {"messages": HI, name: 10**30}).token_limit == schema.MAX_ANSWER_TOKENS


def test_parts_are_passed_on_as_they_are() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    assert content([*HI, {"role": "assistant", "content": parts}])[1] == parts
    assert content([*HI, {"role": "assistant", "content": "x", "nanochat_parts": parts}])[1] == parts


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_media_are_refused_by_name(kind: str) -> None:
    error = refusal(ChatRequest, {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": "x"}}]}]})
    assert error.param == "messages[0].content[0].type" and kind in error.message and "text only" in error.message


def test_tool_results_go_into_the_answer_that_called() -> None:
    result = {"role": "tool", "tool_call_id": "c1", "content": "2"}
    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "1+1"}]
    parts.append({"type": "python_output", "text": "2"})
    assert content([*HI, CALLED, result])[1] == parts
    after = [*HI, CALLED, result, {"role": "assistant", "content": "2."}, *HI]
    assert content(after)[1] == [*parts, {"type": "text", "text": "2."}] and len(content(after)) == 3


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "tool_call_id": "c1", "content": "2"}], "messages[0].role"),
        ([*HI, CALLED, {"role": "tool", "tool_call_id": "c2", "content": "2"}], "messages[2].role"),
        ([*HI, CALLED, *HI], "messages[2].role"),
        ([*HI, CALLED], "messages"),
        ([*HI, CALLED | {"tool_calls": [CALL, CALL]}], "messages[1].tool_calls[1].id"),
        (
            [*HI, CALLED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "{}"}}]}],
            "messages[1].tool_calls[0].function.name",
        ),
        *(
            (
                [*HI, CALLED | {"tool_calls": [CALL | {"function": {"name": "calculator", "arguments": arguments}}]}],
                "messages[1].tool_calls[0].function.arguments",
            )
            for arguments in ("", "[]", "{}", '{"a": 1}', "[" * 5000)
        ),
    ],
)
def test_calls_without_results_and_results_without_calls_are_refused(messages: list[Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        content(messages)
    assert (caught.value.status_code, caught.value.body.error.param) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "messages": HI}, "messages"),
    ],
)
def test_wrong_completion_requests_are_refused(body: dict[str, Any], param: str) -> None:
    assert refusal(TextCompletionRequest, body).param == param


def test_events_are_one_line_each() -> None:
    text = "".join(map(chr, [*range(0x100), 0x2028, 0x2029, 0x1F600]))
    raw = schema.event({"token": text})
    assert len(raw.decode().splitlines()) == 2 and raw.endswith(b"\n\n")  # httpx and requests split lines in this way
    assert json.loads(raw.removeprefix(b"data: ")) == {"token": text}
    assert "é".encode() in raw
