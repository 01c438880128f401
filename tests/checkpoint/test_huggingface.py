"""The folder for transformers, in a process without this project, against our model, engine, tokenizer and renderer."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from small_model import WINDOWED, random_batch, random_params

from experiments import convert, export
from nanochat import checkpoint, data, distributed, infer, model, tree
from nanochat.checkpoint import huggingface, tensor_files
from nanochat.config import UserError
from nanochat.data import chat_format, tokenizer
from nanochat.model import Params

SCRIPT = Path(__file__).parents[1] / "helpers" / "transformers_process.py"
pytest.importorskip("safetensors")


def make_tokenizer() -> data.Tokenizer:
    rng = random.Random(1)
    words = [
        "the",
        " and",
        "token",
        "tokens",
        " token",
        "def",
        "return",
        "12",
        "  ",
        "\n\n",
        "?!",
        "ééé",
        "aaaa",
        "hello",
    ]
    return tokenizer.train(("".join(rng.choices(words, k=30)) for _ in range(60)), 330)


TOK = make_tokenizer()
CONFIG = dataclasses.replace(WINDOWED, vocab_size=TOK.vocab_size)  # grouped heads, windows of 128 and 256 tokens


def make_params() -> Params:
    """Return random parameters that never call a tool, which the engine would answer."""
    params = random_params(CONFIG)
    params["lm_head"][TOK.special("<|python_start|>") :] = 0
    return params


def texts() -> list[str]:
    rng = random.Random(0)
    source = Path(huggingface.__file__).read_text("utf-8")
    parts = [
        *tokenizer.SPECIALS,
        "<|",
        "|>",
        "'Re",
        "  ",
        "\n",
        "\r\n\t",
        "12345",
        " token",
        "é",
        "中文",
        "🙂‍🔥",
        "\ufdd0",
    ]
    made = ["".join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(700)]
    made += ["".join(chr(rng.randrange(0xD800)) for _ in range(rng.randint(1, 20))) for _ in range(700)]
    starts = [rng.randrange(len(source)) for _ in range(600)]
    return made + [source[start : start + rng.randint(1, 200)] for start in starts]


def conversations() -> list[list[dict[str, Any]]]:
    rng, some = random.Random(2), [text for text in texts() if text.strip()]
    made: list[list[dict[str, Any]]] = []
    for i in range(20):
        messages: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(some)}] * (i % 3 == 1)
        for _ in range(rng.randint(1, 3)):
            parts = [{"type": "text", "text": rng.choice(some)} for _ in range(2)]
            messages.append(
                {"role": rng.choice(["user", "human"]), "content": parts if i % 4 == 2 else rng.choice(some)}
            )
            messages += [{"role": "User", "content": "and ?!\n"}] * (i % 5 == 3)
            call = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
            answer: Any = [*parts, *call, {"type": "text", "text": " <|assistant_end|>"}] if i % 2 else rng.choice(some)
            messages += [{"role": "assistant", "content": answer}] * (1 + (i % 7 == 5))
        made.append(messages)
    made[0] = [{"role": "user", "content": "<|assistant_start|> hi <|bos|>"}, {"role": "assistant", "content": ""}]
    return made


REFUSED = {
    "role tool, expected": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
    "it answers no user message": [{"role": "assistant", "content": "a"}],
    "no user message": [{"role": "system", "content": "a"}],
    "tool_calls is not supported": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},
    ],
    "must be a string": [{"role": "user", "content": None}],
    "type python is not supported": [{"role": "user", "content": [{"type": "python", "text": "1"}]}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tiny_run.save_run(folder, "windowed", config=CONFIG, params=make_params(), tok=TOK, steps=(7,), stage="sft")
        yield folder


def run_export(**settings: Any) -> Path:
    export.run(export.Config(run="windowed", **settings), distributed.init("cpu"))
    return Path(settings.get("out") or checkpoint.runs_folder().parent / "exports" / f"windowed_{settings['format']}")


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    return run_export(format="hf")


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers computes."""
    pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("theirs")
    inputs = {"tokens": tokens(), "prompts": prompts(), "texts": texts(), "conversations": conversations()}
    torch.save(inputs | {"refused": list(REFUSED.values())}, place / "inputs.pt")
    command = [sys.executable, "-I", str(SCRIPT), str(folder), str(place / "inputs.pt"), str(place / "outputs.pt")]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(place / "outputs.pt") | {"saved": place / "outputs.pt.folder"}


def tokens() -> torch.Tensor:
    return random_batch(CONFIG, rows=2, n_time=300)["inputs"]  # more than the training context


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[TOK.bos, *(rng.randrange(256) for _ in range(n))] for n in (3, 10, 30, 64, 100, 128, 150, 190)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logits", "steps", "eager"])
def test_logits(theirs: dict[str, Any], name: str) -> None:
    ours = model.apply(make_params(), tokens())
    assert (theirs[name] - ours).abs().max() < 1e-5
    assert (theirs["n_attentions"], theirs["n_hidden"]) == (CONFIG.n_layer, CONFIG.n_layer + 1)


@pytest.mark.slow
def test_padding_does_not_change_a_row(theirs: dict[str, Any]) -> None:
    ours = model.apply(make_params(), tokens()[:1, :-7])[0]
    assert (theirs["right_padded"] - ours).abs().max() < 1e-5
    assert (theirs["left_padded"] - ours).abs().max() < 1e-5


@pytest.mark.slow
def test_generate_equals_the_engine(theirs: dict[str, Any]) -> None:
    engine = infer.start(make_params(), CONFIG, TOK, slots=8, compile=False)
    requests = [infer.Request(tuple(p), max_tokens=64, temperature=0) for p in prompts()]
    ours = [completion.tokens for completion in infer.complete(engine, requests)]
    assert sum(map(len, ours)) > 200, "most prompts are continued"
    assert theirs["single"] == ours
    assert [row[: len(own)] for row, own in zip(theirs["batch"], ours)] == ours  # then padding
    assert theirs["beams"] == theirs["beams_uncached"]


@pytest.mark.slow
def test_ids_equal_the_tokenizer_and_the_renderer(theirs: dict[str, Any]) -> None:
    for text, ids in zip(texts(), theirs["texts"], strict=True):
        assert ids == TOK.encode(text), repr(text)
    assert theirs["decoded"] == [TOK.decode(ids) for ids in theirs["texts"][:50]]
    assert theirs["parsed"] == [*TOK.encode("a"), TOK.bos]
    for messages, ids, rendered in zip(conversations(), theirs["conversations"], theirs["rendered"], strict=True):
        assert ids == chat_format.render(TOK, {"messages": messages})[0], messages
        assert rendered == ids
    plain = [i for i, x in enumerate(conversations()) if "<|" not in json.dumps(x)]
    assert plain and all(theirs["rendered_parsed"][i] == theirs["conversations"][i] for i in plain)
    assert theirs["prompt"] == chat_format.prompt(TOK, conversations()[0][:1])
    for message, refused in zip(REFUSED, theirs["refused"], strict=True):
        assert message in refused


@pytest.mark.slow
def test_training_and_half_precision(theirs: dict[str, Any]) -> None:
    batch = {"inputs": tokens()[:, :-1], "targets": tokens()[:, 1:]}
    assert theirs["loss"] == pytest.approx(model.loss.next_token(make_params(), batch)[0].item(), abs=1e-5)
    assert theirs["same_grads"] == theirs["grads"] and len(theirs["grads"]) == len(model.spec(CONFIG))
    vectors = {huggingface.NAMES[name] for name, row in model.spec(CONFIG).items() if len(row.shape) == 1}
    dtypes = theirs["half_dtypes"]
    assert {name for name in dtypes if dtypes[name] == "torch.float32"} == vectors
    half = tree.unflatten({n: x.bfloat16() if x.dim() > 1 else x for n, x in tree.flatten(make_params()).items()})
    ours = model.apply(half, tokens(), config=CONFIG)
    assert (theirs["half"] - ours).abs().max() < 0.1


@pytest.mark.slow
def test_a_folder_that_transformers_saved_is_read(theirs: dict[str, Any]) -> None:
    params, tok, settings = huggingface.load(theirs["saved"])
    assert_same(params, make_params())
    assert tok.fingerprint == TOK.fingerprint and settings["step"] == 7


def assert_same(got: Params, want: Params) -> None:
    a, b = tree.flatten(got), tree.flatten(want)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in b)


@pytest.mark.parametrize("format", ["hf", "safetensors", "reference"])
def test_round_trip(base: Path, folder: Path, format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder if format == "hf" else run_export(format=format)
    relative = str(path.relative_to(base))  # to the base folder, not to the current one
    convert.run(convert.Config(model=relative, name=f"from_{format}"), distributed.init("cpu"))
    loaded = checkpoint.load(f"from_{format}", device="cpu", dtype=torch.float32)
    assert (loaded.step, loaded.stage, loaded.config) == (7, "sft", CONFIG)
    assert_same(loaded.params, make_params())
    assert loaded.tokenizer.fingerprint == TOK.fingerprint
    assert "--experiment=chat" in capsys.readouterr().out
    if format != "reference":  # whose .pt is torch's format, read with weights_only
        assert not [file for file in path.iterdir() if b"pickle" in file.read_bytes() and file.suffix != ".py"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_halves_the_weights_and_reads_back(base: Path, tmp_path: Path, dtype: Any) -> None:
    path = run_export(format="hf", dtype=dtype, out=str(tmp_path / "out"))
    params, _, settings = huggingface.load(path)
    kind = distributed.DTYPES[dtype]
    assert settings["dtype"] == dtype
    for name, x in tree.flatten(params).items():
        want = tree.flatten(make_params())[name]
        assert torch.equal(x.float(), want.to(kind).float() if want.dim() > 1 else want), name


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {name: torch.randn(64, 8) for name in "abcd"}
    tensor_files.write(tmp_path, tensors, shard_size=5000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2
    read = tensor_files.read(tmp_path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], tensors[n]) for n in tensors)
    index = json.loads((tmp_path / tensor_files.INDEX).read_text())
    first = index["weight_map"]["a"]
    for change, message in (
        ({"a": f"../{first}"}, "is not a file of this folder"),
        ({"z": first}, f"{first}: has no z, which the index places there"),
        ({"a": index["weight_map"]["d"]}, f"{first}: holds a, which the index does not place there"),
        ({"a": "absent.safetensors"}, "absent.safetensors: cannot be read"),
    ):
        changed = index | {"weight_map": index["weight_map"] | change}
        (tmp_path / tensor_files.INDEX).write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            tensor_files.read(tmp_path)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop(Q), f"{Q} is missing"),
        (lambda x: x.update({"model.extra": torch.ones(2)}), "model.extra is not of nanochat's GPT with 3 layers"),
        (lambda x: x.update({Q: x[Q][:-1].clone()}), rf"{Q} has shape \(31, 32\), the config wants \(32, 32\)"),
        (lambda x: x.update({Q: x[Q].long()}), rf"{Q} \(strided int64 on cpu\) does not hold float32"),
    ],
)
def test_mismatched_tensors_are_refused_by_name(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    tensors = tensor_files.read(folder)
    change(tensors)
    (tmp_path / "copy" / tensor_files.FILE).unlink()
    tensor_files.write(tmp_path / "copy", tensors)
    with pytest.raises(UserError, match=message):
        convert.run(convert.Config(model=str(tmp_path / "copy"), name="refused"), distributed.init("cpu"))
    assert not (checkpoint.runs_folder() / "refused").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", '{"model_type": "llama"}', "has model_type 'llama', expected 'nanochat_gpt'"),
        ("config.json", "[1]", "config.json: not a JSON object"),
        ("config.json", '{"model_type": "nanochat_gpt", "vocab_size": 3}', "has no max_position_embeddings"),
        ("tokenizer.json", '{"model": {}}', "not a tokenizer of --experiment=export"),
        ("model.safetensors", "garbage", "not a safetensors file, or a truncated one"),
    ],
)
def test_other_folders_are_refused(folder: Path, tmp_path: Path, file: str, text: str, message: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / file).chmod(0o644)
    (tmp_path / "copy" / file).write_text(text)
    with pytest.raises(UserError, match=message):
        huggingface.load(tmp_path / "copy")


def test_export_describes_itself_and_refuses_a_used_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"windowed_hf exists: delete it, or --set out="):
        run_export(format="hf")
    with pytest.raises(UserError, match="aot and context are settings of format=pt2"):
        run_export(format="hf", aot=True)
    card = (folder / "README.md").read_text()
    assert "step 7, stage sft" in card and "apply_chat_template" in card and "| parameters |" in card
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("seed", range(3))
def test_tokenizer_json_of_an_odd_vocabulary(seed: int) -> None:
    """Tokens that no merge of two others makes, and several pairs for one token."""
    import tokenizers

    rng = random.Random(seed)
    odd = {bytes(rng.choices(b"ab", k=rng.randint(2, 7))) for _ in range(40)}
    tok = data.Tokenizer((*(bytes([i]) for i in range(256)), *sorted(odd, key=lambda _: rng.random())))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(huggingface.tokenizer_json(tok)))
    for _ in range(300):
        text = "".join(rng.choices("ab ", weights=(5, 5, 1), k=rng.randint(1, 40)))
        assert theirs.encode(text).ids == tok.encode(text), text
