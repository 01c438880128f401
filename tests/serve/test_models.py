"""Several models on one server: choice by name, tokenizers, adapters on one base, slots and turns."""

import dataclasses
import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_server
import httpx
import pytest
import scripted
import small_engine
import tiny_run
import torch
from small_model import random_params

from experiments import web
from nanochat import checkpoint, infer, model, serve, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.serve import ApiConfig, worker

# The second model has another vocabulary, width and context.
WORDS = Tokenizer((*(bytes([i]) for i in range(256)), b"he", b"ll"))
WIDE = dataclasses.replace(small_engine.CONFIG, vocab_size=WORDS.vocab_size, n_embd=64, sequence_len=64)
GREEDY: Any = {"temperature": 0, "max_tokens": 24}
LOCAL: Any = {"device": "cpu", "compile": False, "slots": 2}


@pytest.fixture(scope="module")
def engines() -> dict[str, infer.Engine]:
    wide = infer.start(random_params(WIDE, 5), WIDE, WORDS, slots=1, compile=False)
    return {"small": small_engine.start(slots=1), "wide": wide}


def alone(engine: infer.Engine, text: str, n: int = GREEDY["max_tokens"]) -> str:
    tokenizer = engine.tools.tokenizer
    request = infer.Request((tokenizer.bos, *tokenizer.encode(text)), n, temperature=0.0)
    (completion,) = infer.complete(engine, [request])
    ends = (tokenizer.bos, tokenizer.special("<|assistant_end|>"))
    return tokenizer.decode([token for token in completion.tokens if token not in ends])


def test_each_model_answers_by_its_name_with_its_text_and_tokenizer(engines: dict[str, infer.Engine]) -> None:
    expected = {name: alone(engine, "hello") for name, engine in engines.items()}
    assert expected["small"] != expected["wide"]
    infos = [
        worker.WorkerInfo(name, 1, "sft", None, engine.tools.tokenizer, engine.context, 1, "cpu", "")
        for name, engine in engines.items()
    ]
    with engine_server.serve_models(engines, infos) as server, httpx.Client(base_url=server.url) as http:

        def ask(name: str | None) -> tuple[str, str]:
            body = GREEDY | {"prompt": "hello", "stream": True} | ({"model": name} if name else {})
            lines = http.post("/v1/completions", json=body).text.splitlines()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            return chunks[0]["model"], "".join(chunk["choices"][0]["text"] for chunk in chunks)

        with ThreadPoolExecutor(8) as pool:  # the models take turns
            answers = pool.map(ask, ["small", "wide", None, "wide", "gpt-3.5-turbo", "small"])
            for got, name in zip(answers, ["small", "wide", "small", "wide", "small", "small"], strict=True):
                assert got == (name, expected[name])
        for name, count in {"small": 5, "wide": 3}.items():
            encoded = http.post("/tokenize", json={"model": name, "prompt": "hello", "add_special_tokens": False})
            assert encoded.json()["count"] == count and encoded.json()["max_model_len"] == engines[name].context
            text = http.post("/detokenize", json={"model": name, "tokens": encoded.json()["tokens"]}).json()["prompt"]
            assert text == "hello"
            chat = GREEDY | {"model": name, "messages": [{"role": "user", "content": "hi"}]}
            assert http.post("/v1/chat/completions", json=chat).json()["model"] == name
            scored = {"model": name, "prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 0}
            logprobs = http.post("/v1/completions", json=scored).json()["choices"][0]["logprobs"]
            assert len(logprobs["tokens"]) == count
        assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == ["small", "wide"]
        stats = http.get("/stats").json()
        assert stats["model"]["name"] == "small" and [entry["name"] for entry in stats["models"]] == ["small", "wide"]
        assert sum(entry["tokens"] for entry in stats["models"]) == stats["tokens"] > 0
        assert 'nanochat_model_answers_total{model="wide"} 4.0' in http.get("/metrics").text
        for response in (http.get("/v1/models/other"), http.post("/tokenize", json={"model": "other", "prompt": "a"})):
            error = response.json()["error"]
            assert response.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
            assert error["message"] == "no such model; this server has small, wide"


def test_a_flood_of_one_model_leaves_the_others_their_slots_and_queue() -> None:
    options: Any = {"models": ("busy", "free"), "slots": 1, "queue_limit": 0, "api": ApiConfig(model_names=("*",))}
    with scripted.serve({"wait": [60.0, ""]}, **options) as server, httpx.Client(base_url=server.url) as http:

        def body(content: str, name: str) -> Any:
            return {"model": name, "messages": [{"role": "user", "content": content}]}

        with http.stream("POST", "/v1/chat/completions", json=body("wait", "any name") | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)  # it has the slot
            assert http.post("/v1/chat/completions", json=body("hi", "busy")).status_code == 503
            assert http.post("/chat/completions", json=body("hi", "free")).text.endswith('"finish_reason":"stop"}\n\n')
            loads = {entry["name"]: entry["active"] for entry in http.get("/stats").json()["models"]}
            assert loads == {"busy": 1, "free": 0}


def test_a_long_prompt_of_one_model_does_not_hold_up_another() -> None:
    engines = {name: small_engine.start(slots=1, chunk=8) for name in ("streams", "reads")}
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=worker.serve_requests, args=(theirs, engines))
    thread.start()
    ours.send(("new", "a", infer.Request(small_engine.prompt(2), 200, temperature=0.0), "streams"))
    assert ours.recv()[0] == "tokens"
    ours.send(("new", "b", infer.Request(small_engine.prompt(121, 1), 1, temperature=0.0), "reads"))
    between = 0
    while (message := ours.recv())[1][0][0] == "a":
        between += 1
    ours.send(("end",))
    thread.join(10)
    assert message[1][0][0] == "b" and between >= 15  # 120 tokens in chunks of 8


def test_adapters_share_the_base_and_answer_as_merged_runs(base: Path) -> None:
    folder = tiny_run.save_run(base, "base")
    targets = ["layers.*.attn.q", "lm_head"]
    for seed, name in enumerate(("one", "two")):
        adapters = model.lora.init(tiny_run.CONFIG, seed, 4, targets)
        adapters = tree.map(lambda x: torch.where(x == 0, 0.3, x), adapters)  # of b
        meta = {"rank": 4, "alpha": 16.0, "targets": targets, "base": checkpoint.base_reference(folder, 1)}
        tiny_run.save_run(base, name, params=adapters, lora=meta, stage="sft")
    sources = web.model_sources(web.Config(run=("base", "one", "two")))
    engines, infos = worker.load(worker.WorkerConfig(sources, **LOCAL))
    flat = [tree.flatten(engine.params) for engine in engines.values()]
    own = [name for name, x in flat[2].items() if x is not flat[0][name]]
    assert len(own) == 3 and {name.rpartition(".")[0] for name in own} == {"", "layers.0.attn", "layers.1.attn"}
    n_bytes = tree.nbytes({name: flat[0][name] for name in own})
    assert f"; {n_bytes / 1e6:.1f} MB of weights beside {(tree.nbytes(flat[0]) - n_bytes) / 1e6:.1f}" in infos[2].about
    texts = {name: alone(engine, "the text", 12) for name, engine in engines.items()}
    assert len(set(texts.values())) == 3
    for name in ("one", "two"):
        loaded = checkpoint.load(name, device="cpu")
        merged = infer.start(loaded.params, loaded.config, loaded.tokenizer, slots=1, compile=False)
        assert texts[name] == alone(merged, "the text", 12)


def test_names_of_models_are_those_of_their_runs(base: Path, tmp_path: Path) -> None:
    tiny_run.save_run(base, steps=(1, 2))
    other = tiny_run.save_run(base, "other")
    elsewhere = tiny_run.save_run(tmp_path, "other")
    with pytest.raises(UserError, match="two models would be called other@1: rename a folder, or"):
        web.model_sources(web.Config(run=("other", str(elsewhere))))
    with pytest.raises(UserError, match="step=1 is for a single run: write run=bot@1,…"):
        web.model_sources(web.Config(run=("bot", "other"), step=1))
    names = [source.name for source in web.model_sources(web.Config(run=("bot@1", "bot", "other")))]
    assert names == ["bot@1", "bot@2", "other"]
    assert web.model_sources(web.Config(run=("other",), step=1)) == (serve.ModelSource("other", str(other), 1),)
