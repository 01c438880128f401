"""The API's language: what is refused and how it is said, stop texts, OpenAI's objects, the schema."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.serve import ApiError, Delta, Sampling, StopSequenceFilter, scheduler
from nanochat.serve import schema as answers
from nanochat.serve import schema as api
from nanochat.serve import schema as openapi

HI = [{"role": "user", "content": "hi"}]


def refused(check: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        check(body)
    assert caught.value.status == 400
    return caught.value


def test_defaults() -> None:
    wanted = api.chat({"messages": HI})
    assert wanted.sampling == Sampling(0.8, 50, 512, None)
    assert wanted.messages == ({"role": "user", "content": "hi"},)
    assert api.completion({"messages": HI, "temperature": None}) == api.Chat(wanted.messages, Sampling(), stream=False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "a list, expected a JSON object"),
        (b"null", "missing, expected a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7 is 0xff"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', 'the key "a" is there twice'),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ("\ufeff{}".encode(), "not JSON"),
    ],
)
def test_bodies_that_are_no_json_object(body: bytes, said: str) -> None:
    error = refused(api.decode, body)
    assert said in error.message and error.code == "invalid_json" and len(error.message) < 200


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        (None, "messages", "messages is missing"),
        ([], "messages", "messages is empty"),
        ("hi", "messages", 'messages is "hi", expected a list'),
        (HI * 501, "messages", "501 messages: at most 500"),
        (["hi"], "messages[0]", "expected an object"),
        ([{"role": "user"}], "messages[0].content", "content is missing"),
        ([{"role": "user", "content": ""}], "messages[0].content", "content is empty"),
        ([{"role": "user", "content": []}], "messages[0].content", "content is empty"),
        ([{"role": "user", "content": 5}], "messages[0].content", "expected a string or a list of parts"),
        ([{"role": "user", "content": {}}], "messages[0].content", "is an object, expected"),
        ([{"role": "user", "content": "x" * 8001}], "messages[0].content", "8,001 characters: at most 8,000"),
        ([{"role": "user", "content": "x" * 8000}] * 5, "messages", "40,000 characters: at most 32,000"),
        ([{"role": "tool", "content": "x"}], "messages[0].role", 'role is "tool", expected user or assistant'),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "role is a list"),
        ([{"content": "x"}], "messages[0].role", "role is missing"),
        ([*HI, {"role": "system", "content": "x"}], "messages[1].role", "a system message comes first"),
        ([{"role": "user", "content": "x", "name": "Bob"}], "messages[0]", '"name" is not supported'),
        ([{"role": "user", "content": "a\ud800"}], "messages[0].content", "surrogate"),
        (
            [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}],
            "messages[0].content[0].type",
            "image_url",
        ),
        ([{"role": "user", "content": [{"type": "python", "text": "x"}]}], "messages[0].content[0].type", "python"),
        ([{"role": "user", "content": [{"type": [], "text": "x"}]}], "messages[0].content[0].type", "a list"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "expected {"),
        ([{"role": "user", "nanochat_parts": []}], "messages[0].nanochat_parts", "assistant's messages"),
        ([*HI, {"role": "assistant", "nanochat_parts": "x"}], "messages[1].nanochat_parts", "expected a list of parts"),
    ],
)
@pytest.mark.parametrize("check", [api.chat, api.completion])
def test_messages_are_refused(check: Any, messages: Any, param: str, said: str) -> None:
    error = refused(check, {"messages": messages})
    assert error.param == param and said in error.message and len(error.message) < 300


def test_the_largest_conversation_passes() -> None:
    assert len(api.messages([{"role": "user", "content": "é" * 8000}] * 4)) == 4
    assert len(api.messages([{"role": "user", "content": "x"}] * 500)) == 500
    body = {"messages": [{"role": "user", "content": "😀" * 8000}] * 4}
    assert len(json.dumps(body)) < api.MAX_BODY_BYTES
    api.chat(api.decode(json.dumps(body).encode()))


BAD_NUMBERS = [
    *(("temperature", value) for value in (-0.1, 2.1, True, "0.5", [], {}, 10**20, float("inf"))),
    *(("top_k", value) for value in (-1, 201, 1.5, False, "5")),
    *(("max_tokens", value) for value in (0, 4097, 1.5, True, -1)),
    *(("seed", value) for value in (2**63, -(2**63) - 1, 0.5, "1", True)),
]


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
@pytest.mark.parametrize("check", [api.chat, api.completion])
def test_numbers_are_refused(check: Any, name: str, value: Any) -> None:
    error = refused(check, {"messages": HI, name: value})
    assert error.param == name and error.message.startswith(f"{name} is ") and "number from" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (0, 2, 0.0, 1.5)),
        *(("top_k", value) for value in (0, 200)),
        *(("max_tokens", value) for value in (1, 4096)),
        *(("seed", value) for value in (0, -(2**63), 2**63 - 1)),
    ],
)
def test_the_bounds_themselves_pass(name: str, value: Any) -> None:
    assert getattr(api.chat({"messages": HI, name: value}).sampling, name) == value


def test_a_misspelt_parameter_is_no_silence() -> None:
    assert "max_token" in refused(api.chat, {"messages": HI, "max_token": 5}).message
    assert refused(api.chat, {"messages": HI, "a\ud800": 5}).param == "a\\ud800"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_p": 0.5}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"model": 5}, "model"),
    ],
)
def test_what_openai_has_and_this_server_has_not(body: dict[str, Any], param: str) -> None:
    assert refused(api.completion, {"messages": HI, **body}).param == param


def test_what_changes_nothing_passes() -> None:
    harmless = {
        **{"user": "u", "metadata": {"a": "b"}, "store": False, "top_p": 1.0, "presence_penalty": 0, "logprobs": False},
        **{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "stop": None},
    }
    assert api.completion({"messages": HI, **harmless}) == api.completion({"messages": HI})
    wanted = api.completion(
        {"messages": HI, "n": 3, "max_completion_tokens": 7, "stop": "a", "model": "m", "stream": True}
    )
    assert (wanted.n, wanted.sampling.max_tokens, wanted.stop, wanted.model, wanted.stream) == (3, 7, ("a",), "m", True)


def test_parts_become_text_or_stay_parts() -> None:
    lines = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert api.messages([{"role": "user", "content": lines}])[0]["content"] == "a\nb"
    assert api.messages([*HI, {"role": "assistant", "content": lines}])[1]["content"] == "ab"
    called = [{"type": "text", "text": "a"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    assert api.messages([*HI, {"role": "assistant", "content": called}])[1]["content"] == called


def test_an_answer_with_tools_can_be_sent_back_as_it_came() -> None:
    header = answers.Header("id", 0, "m")
    pieces = [Delta("text", "a"), Delta("text", "b"), Delta("python", "1+1"), Delta("output", "2"), Delta("text", "c")]
    message = answers.whole(header, [(pieces, "stop")], answers.usage(1, 2))["choices"][0]["message"]
    assert message["content"] == "abc"
    assert api.messages([*HI, json.loads(json.dumps(message))])[1]["content"] == [
        {"type": "text", "text": "ab"},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "c"},
    ]


def test_events_are_one_line_each() -> None:
    text = "".join(map(chr, [*range(0x100), 0x2028, 0x2029, 0x1F600]))
    raw = answers.event({"token": text})
    assert len(raw.decode().splitlines()) == 2 and raw.endswith(b"\n\n")  # httpx and requests cut lines in this way
    assert json.loads(raw.removeprefix(b"data: ")) == {"token": text}
    assert "é".encode() in raw


# Stop texts


def stopped(stops: tuple[str, ...], texts: list[str]) -> tuple[str, bool]:
    stopper = StopSequenceFilter(stops)
    found = [piece for text in texts for piece in stopper.feed([("text", text)])] + stopper.close()
    return "".join(piece.text for piece in found), stopper.stopped


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.randoms())
def test_an_answer_ends_before_its_first_stop_text_however_it_is_cut(text: str, stops: list[str], random: Any) -> None:
    cuts = sorted(random.randint(0, len(text)) for _ in range(random.randint(0, 6)))
    texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    # The one that is complete first ends the answer; of those that end in one place, the longest.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    got, is_stopped = stopped(tuple(stops), texts)
    assert is_stopped == bool(ends)
    assert text.startswith(got)
    if not ends:
        assert got == text
    else:
        assert not any(stop in got for stop in stops)
        assert any(text[len(got) :].startswith(stop) for stop in stops)


def test_stop_texts_hold_back_no_more_than_may_become_one() -> None:
    stopper = StopSequenceFilter(("END",))
    assert stopper.feed([("text", "a E")]) == [Delta("text", "a ")]
    assert stopper.feed([("text", "N")]) == []
    assert stopper.feed([("text", "x")]) == [Delta("text", "ENx")]
    assert stopper.feed([("text", "E"), ("python", "END")]) == [Delta("text", "E"), Delta("python", "END")]
    assert not stopper.stopped
    assert stopper.feed([("text", "yEND"), ("text", "z")]) == [Delta("text", "y")] and stopper.stopped


# Fuzz

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
NAMES = st.sampled_from([*api.NATIVE, *api.NEUTRAL, *api.HARMLESS, "n", "stop", "stream", "stream_options", "model"])
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": JSON})


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=4), st.lists(MESSAGE, max_size=3) | JSON)
def test_any_json_is_checked_or_refused(body: dict[str, Any], messages: Any) -> None:
    for check in (api.chat, api.completion):
        try:
            wanted = check({"messages": messages} | body)
        except ApiError as error:
            assert error.status == 400
            json.dumps(api.error_body(error)).encode()
        else:
            assert 0 <= wanted.sampling.temperature <= 2 and 1 <= wanted.sampling.max_tokens <= 4096


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    try:
        assert isinstance(api.decode(body), dict)
    except ApiError as error:
        assert error.status == 400


# Schema, metrics


def test_the_schema_has_the_numbers_of_the_checks() -> None:
    document = openapi.openapi()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, (low, high, _, default, _) in api.NUMBERS.items():
        found = schema["properties"][name]
        assert (found["minimum"], found["maximum"], found.get("default")) == (low, high, default)
    api.completion({"messages": HI} | {name: found[0] for name, found in api.NUMBERS.items()})


def test_histograms_are_cumulative() -> None:
    counts = scheduler.Counters()
    for seconds in (0.001, 0.005, 0.3, 1000.0):
        counts.observe("answer_seconds", seconds)
    lines = scheduler.histogram("answer_seconds", "About.", counts)
    assert 'nanochat_answer_seconds_bucket{le="0.005"} 2' in lines  # a bound belongs to its interval
    assert 'nanochat_answer_seconds_bucket{le="0.5"} 3' in lines
    assert 'nanochat_answer_seconds_bucket{le="+Inf"} 4' in lines
    assert lines[-1] == "nanochat_answer_seconds_count 4"
    assert counts.mean("answer_seconds") == pytest.approx(250.0765)
    assert counts.mean("other") == 0
