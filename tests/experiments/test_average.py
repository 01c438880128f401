"""Model soups: the mean of checkpoints as a run of its own."""

import json
from pathlib import Path

import pytest
import torch
from small_model import CONFIG, assert_trees_close, random_params

from experiments import average, convert
from nanochat import checkpoint, model, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.distributed import Runtime

CPU = Runtime(0, 0, 1, 1, 0, torch.device("cpu"), torch.float32)
TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))
SHAPE = model.ModelConfig(**{**vars(CONFIG), "vocab_size": TOKENIZER.vocab_size})


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models near each other, one far away, and one of another shape."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "val"):
        lines = (json.dumps({"text": "the herring boats came home before the storm " * 3}) for _ in range(40))
        (texts / f"{name}.jsonl").write_text("\n".join(lines))
    meta = {"stage": "base", "config": {"data.source": str(texts)}}
    start = model.init(SHAPE, 0)
    near = tree.map(lambda x: x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), start)
    far = tree.map(lambda x: 3 * x, random_params(SHAPE, 7))
    for name, params in (("start", start), ("near", near), ("far", far)):
        convert.write_run(name, 5, params, SHAPE, TOKENIZER, meta)
    other = model.ModelConfig(**{**vars(SHAPE), "n_layer": 2})
    convert.write_run("other", 5, model.init(other, 0), other, TOKENIZER, meta)


def average_of(*names: str, **settings: object) -> None:
    average.run(average.Config(runs=names, tokens=64, device_batch_size=2, **settings), CPU)  # pyright: ignore


def params_of(name: str) -> object:
    return checkpoint.load_params(checkpoint.find_run(name) / "checkpoints")[0]


def test_uniform_soup_is_the_mean_and_loads_as_a_run(capsys: pytest.CaptureFixture[str]):
    average_of("start", "near", "far")
    want = tree.map(lambda *xs: sum(xs) / 3, *map(params_of, ("start", "near", "far")))
    assert_trees_close(params_of("start_average"), want, rtol=1e-6)
    loaded = checkpoint.load("start_average", device="cpu")
    assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert checkpoint.inspect("start_average").meta["average"] == ["start@5", "near@5", "far@5"]
    assert "start_average" in capsys.readouterr().out


def test_greedy_soup_leaves_out_what_makes_it_worse(capsys: pytest.CaptureFixture[str]):
    average_of("far", "start", method="greedy", name="soup")
    assert "no mean is better than start@5 alone: no run is written" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such run"):
        checkpoint.load("soup")


@pytest.mark.parametrize(
    "names, settings, message",
    [
        (("start",), {}, "an average needs two checkpoints, not 1"),
        (("start", "other"), {}, "other@5 has another shape than start@5"),
        (("start", "near"), {"last": 3}, "last=3 is for one run, and runs names 2"),
        (("start", "near@4"), {}, "no checkpoint of step 4"),
    ],
)
def test_what_has_no_mean_is_refused(names: tuple[str, ...], settings: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        average_of(*names, **settings)
