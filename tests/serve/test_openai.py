"""OpenAI's client, and the documented examples of vLLM and llama.cpp, against the server with a small model."""

import json
from collections.abc import Iterator
from typing import Any

import engine_server
import httpx
import openai
import pytest
import scripted
import torch
from small_engine import PARAMS, TOKENIZER

from nanochat import model
from nanochat.serve import ApiConfig

HI: list[Any] = [{"role": "user", "content": "hi"}]
CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[scripted.Server]:
    with engine_server.serve() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: scripted.Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "nanochat", "messages": HI, "max_tokens": 4, "seed": 1} | more)


def complete(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(**{"model": "small", "prompt": "hi", "max_tokens": 4, "seed": 1} | more)


def logprobs_of(ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model.apply(PARAMS, torch.tensor([ids]))[0].float(), -1)


# What is answered


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "developer", "content": "Be brief."}, *HI]},
        {"messages": [{"role": "system", "content": ""}, *HI]},
        {"messages": [*HI, {"role": "assistant", "content": ""}, *HI]},
        {"messages": [HI[0] | {"name": "ann"}, {"role": "user", "content": [{"type": "text", "text": "you"}]}]},
        {"max_tokens": 10**9},
        {"max_tokens": None, "max_completion_tokens": 3},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"temperature": 0},
        {"temperature": 2, "top_p": 0.3},
        {"top_p": 0},
        {"presence_penalty": 2, "frequency_penalty": -2},
        {"logit_bias": {"65": 100, "66": -100}},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 20},
        {"n": 3},
        {"stop": ["a", "b", "c", "d"]},
        {"response_format": {"type": "text"}},
        {"tools": [CALCULATOR]},
        {"tools": [CALCULATOR], "tool_choice": "none"},
        {"extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}},
        {"extra_body": {"skip_special_tokens": True, "ignore_eos": False, "guided_json": None, "unknown": None}},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_chats_are_answered(client: openai.OpenAI, more: dict[str, Any]) -> None:
    answer = chat(client, **more)
    if more.get("stream"):
        chunks = list(answer)
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
        assert bool(chunks[-1].usage) == ("stream_options" in more)
        return
    assert [choice.finish_reason in ("stop", "length") for choice in answer.choices] == [True] * more.get("n", 1)
    assert 0 < answer.usage.completion_tokens <= 4 * more.get("n", 1) or more.get("max_tokens", 4) != 4


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ({}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [104, 105]}, 1),
        ({"prompt": [[104, 105], [106]], "n": 2}, 4),
        ({"prompt": [TOKENIZER.bos, 104]}, 1),
        ({"prompt": ""}, 1),
        ({"echo": True}, 1),
        ({"echo": True, "max_tokens": 0}, 1),
        ({"logprobs": 5}, 1),
        ({"echo": True, "logprobs": 0, "max_tokens": 0}, 1),
        ({"best_of": 3, "n": 2}, 2),
        ({"stop": "\n", "suffix": None, "user": "u"}, 1),
        ({"temperature": 0, "top_p": 0.5, "logit_bias": {"65": 5}}, 1),
        ({"extra_body": {"add_special_tokens": False, "top_k": 3}}, 1),
    ],
)
def test_completions_are_answered(client: openai.OpenAI, more: dict[str, Any], texts: int) -> None:
    answer = complete(client, **more)
    assert [choice.index for choice in answer.choices] == list(range(texts))
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
    if more.get("echo"):
        assert answer.choices[0].text.startswith("hi")


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [found.id for found in client.models.list()] == ["small"]
    for name in ("small", "nanochat", "gpt-3.5-turbo"):
        assert client.models.retrieve(name).id == "small"
    with pytest.raises(openai.NotFoundError, match="this server has small"):
        client.models.retrieve("gpt-4/x")


# What is refused


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "type"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "type"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "modalities"),
        ({"tools": [{"type": "function", "function": {"name": "search"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 100}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"extra_body": {"min_tokens": 3}}, "min_tokens"),
        ({"extra_body": {"guided_choice": ["a", "b"]}}, "guided_choice"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ],
)
def test_chats_are_refused_by_name(client: openai.OpenAI, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **more)
    assert (param in str(caught.value.param) and param in caught.value.message) or "text only" in caught.value.message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"prompt": [1, 999]}, "prompt"),
        ({"prompt": ["a", [-1]]}, "prompt[1]"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a\ud800"}, "prompt"),
    ],
)
def test_completions_are_refused_by_name(server: scripted.Server, more: dict[str, Any], param: str) -> None:
    content = json.dumps({"prompt": "a"} | more)  # the client cannot send half of a surrogate pair
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


# Log-probabilities


def test_echo_has_the_log_probabilities_of_the_model(client: openai.OpenAI) -> None:
    prompts = ["One fish, two fish", "One fish, two cats", "Red"]
    answer = complete(client, prompt=prompts, echo=True, logprobs=2, max_tokens=2, temperature=0)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        sent = TOKENIZER.encode(prompt)
        expected = logprobs_of([TOKENIZER.bos, *sent])
        found = choice.logprobs
        assert found.tokens[: len(sent)] == list(prompt) and found.token_logprobs[0] is None
        assert found.text_offset[: len(sent) + 1] == list(range(len(sent) + 1))
        for i, token in enumerate(sent[1:], start=1):
            assert found.token_logprobs[i] == pytest.approx(float(expected[i, token]), abs=1e-4)
            assert max(found.top_logprobs[i].values()) == pytest.approx(float(expected[i].max()), abs=1e-4)
        assert found.token_logprobs[len(sent)] == pytest.approx(float(expected[-1].max()), abs=1e-4)
        # The greedy token without the engine, from the scores of the prompt, is the engine's.
        (single,) = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0).choices
        assert single.logprobs.tokens[-1] == found.tokens[len(sent)]


def test_chat_log_probabilities_belong_to_the_text(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=8, temperature=0)
    content = answer.choices[0].logprobs.content
    data = bytes(byte for token in content for byte in token.bytes)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content
    assert all(token.top_logprobs[0].logprob == token.logprob and len(token.top_logprobs) == 3 for token in content)
    streamed = chat(client, logprobs=True, max_tokens=8, temperature=0, stream=True)
    chunks = [chunk.choices[0].logprobs for chunk in streamed]
    assert [t.token for found in chunks if found for t in found.content] == [token.token for token in content]


def test_best_of_returns_the_most_likely(client: openai.OpenAI) -> None:
    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    every = complete(client, n=4, logprobs=0, temperature=1).choices
    best = complete(client, n=2, best_of=4, logprobs=0, temperature=1).choices
    assert [choice.text for choice in best] == [c.text for c in sorted(every, key=mean, reverse=True)[:2]]


# Tools


def test_agent_loop() -> None:
    def reply(content: str, request: Any) -> list[Any]:
        if TOKENIZER.decode(request.prompt).endswith("<|output_end|>"):
            return ["56."]
        return ["It is ", ("python", "7*8"), ("output", "56"), "56."]

    with scripted.serve(reply) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        messages = [*HI]
        answer = chat(client, messages=messages, tools=[CALCULATOR], max_tokens=99).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", "It is ")
        (call,) = answer.message.tool_calls
        assert call.function.name == "calculator" and json.loads(call.function.arguments) == {"expression": "7*8"}
        messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "56"}]
        answer = chat(client, messages=messages, tools=[CALCULATOR], max_tokens=99).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("stop", "56.")
        assert server.prompts[-1].endswith("It is <|python_start|>7*8<|python_end|><|output_start|>56<|output_end|>"), (
            "the same answer goes on"
        )
        messages += [answer.message, *HI]
        chat(client, messages=messages, max_tokens=99)
        assert "<|output_end|>56.<|assistant_end|><|user_start|>hi" in server.prompts[-1]

        chunks = list(chat(client, tools=[CALCULATOR], max_tokens=99, stream=True))
        (call,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        assert json.loads(call.function.arguments) == {"expression": "7*8"}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        for more in ({}, {"tools": [CALCULATOR], "tool_choice": "none"}):  # the server answers the call itself
            answer = chat(client, max_tokens=99, **more).choices[0]
            assert (answer.message.content, answer.message.tool_calls) == ("It is 56.", None)
        forced: Any = {"type": "function", "function": {"name": "calculator"}}
        chat(client, tools=[CALCULATOR], tool_choice=forced, max_tokens=99)
        assert server.prompts[-1].endswith("<|assistant_start|><|python_start|>")


# Structured output


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA},  # llama.cpp
    ],
)
@pytest.mark.parametrize("temperature", [0, 2])
def test_answers_follow_the_schema(client: openai.OpenAI, response_format: Any, temperature: float) -> None:
    answer = chat(client, response_format=response_format, n=2, max_tokens=100, temperature=temperature)
    for choice in answer.choices:
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and set(found) == {"name", "kind"}
        assert len(found["name"]) <= 5 and found["kind"] in ("cat", "dog")
    assert chat(client, response_format={"type": "json_object"}).choices[0].message.content.startswith("{")
    text = complete(client, max_tokens=100, extra_body={"response_format": response_format}).choices[0].text
    assert set(json.loads(text)) == {"name", "kind"}


@pytest.mark.parametrize("schema", [{"type": "foo"}, {"$ref": "#/nowhere"}, {"pattern": "(", "type": "string"}])
def test_schemas_that_cannot_be_followed_are_refused(client: openai.OpenAI, schema: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format is not supported for this") as caught:
        chat(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert caught.value.param == "response_format"


# Defaults and documented examples


def test_defaults_of_the_server_apply_where_a_request_says_nothing() -> None:
    defaults = ApiConfig(temperature=0.0, top_k=7, top_p=0.5, max_tokens=3, model_names=("*",))
    with scripted.serve({"": ["abcdef"]}, api=defaults) as server:
        for body in ({}, {"model": "any", "temperature": 1, "top_k": 5, "max_tokens": 5, "top_p": 1}):
            assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HI} | body).is_success
        (_, silent), (_, explicit) = server.requests
        assert (silent.temperature, silent.top_k, silent.top_p, silent.max_tokens) == (0.0, 7, 0.5, 3)
        assert (explicit.temperature, explicit.top_k, explicit.top_p, explicit.max_tokens) == (1, 5, 1, 5)
        assert httpx.get(f"{server.url}/stats").json()["defaults"]["top_k"] == 7


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # vLLM's quickstart, with the name of the model that is served
        ("completions", {"model": "small", "prompt": "San Francisco is a", "max_tokens": 7, "temperature": 0}),
        (
            "chat/completions",
            {
                "model": "small",
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": "Who won the world series in 2020?"},
                ],
            },
        ),
        # llama.cpp's README
        ("completions", {"model": "davinci-002", "prompt": "I believe the meaning of life is", "max_tokens": 8}),
        (
            "chat/completions",
            {
                "model": "gpt-3.5-turbo",
                "messages": [
                    {"role": "system", "content": "You are ChatGPT, an AI assistant."},
                    {"role": "user", "content": "Write a limerick about python exceptions"},
                ],
            },
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_documented_examples(server: scripted.Server, path: str, body: dict[str, Any], stream: bool) -> None:
    more = {"stream": True} if stream else {}
    headers = {"Authorization": "Bearer no-key"}
    response = httpx.post(f"{server.url}/v1/{path}", json=body | {"max_tokens": 5} | more, headers=headers, timeout=30)
    assert response.status_code == 200
    if stream:
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")


# Tokens


def test_tokenize_and_detokenize(server: scripted.Server) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(server.url + path, json=body).json()

    found = post("/tokenize", model="small", prompt="hé", return_token_strs=True)
    assert found["tokens"] == [TOKENIZER.bos, *"hé".encode()] and found["count"] == 4 and found["max_model_len"] == 256
    assert found["token_strs"] == ["<|bos|>", "h", "bytes:\\xc3", "bytes:\\xa9"]
    assert post("/detokenize", tokens=found["tokens"]) == {"prompt": "<|bos|>hé"}
    assert post("/tokenize", prompt="a<|bos|>", add_special_tokens=False)["tokens"] == list(b"a<|bos|>")
    assert post("/tokenize", prompt="<|bos|>", add_special_tokens=False)["tokens"] == [TOKENIZER.bos]
    assert TOKENIZER.decode(post("/tokenize", messages=HI)["tokens"]).endswith("hi<|user_end|><|assistant_start|>")
    assert post("/tokenize", messages=HI, add_generation_prompt=False)["count"] == 5
    assert post("/tokenize")["error"]["param"] == "prompt"
    assert post("/detokenize", tokens=[999])["error"]["param"] == "tokens"
    assert httpx.get(f"{server.url}/tokenizer_info").json()["bos_token"] == "<|bos|>"
