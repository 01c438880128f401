"""Loading a trained model from a run: contents, dtypes, defaults, and errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import assert_trees_close, random_params
from tiny_run import CONFIG, TEXT, TOK, save_run, set_time

from experiments import convert
from nanochat import checkpoint, distributed, model, tree
from nanochat.checkpoint import convert as reference
from nanochat.config import UserError
from nanochat.data import Tokenizer, tokenizer
from nanochat.model import Compute, ModelConfig


def test_everything_is_read_from_the_checkpoint(base: Path):
    folder = save_run(base, steps=(1, 2))
    tokenizer.save(Tokenizer(TOK.tokens[:256]), folder / "tokenizer")  # trained anew since
    loaded = checkpoint.load("bot", device="cpu")
    assert (loaded.name, loaded.step, loaded.stage, loaded.folder) == ("bot", 2, "base", folder)
    assert loaded.config == CONFIG and loaded.tokenizer == TOK
    assert_trees_close(loaded.params, random_params(CONFIG, 2), rtol=0)
    assert_trees_close(checkpoint.load("bot", step=1).params, random_params(CONFIG, 1), rtol=0)
    assert checkpoint.describe_model(loaded) == (
        f"bot, step 2 (base): {model.count(CONFIG)['total'] / 1000:.3g}k parameters, 267 tokens of vocabulary, "
        "context 64, cpu float32"
    )
    assert str(checkpoint.warning(loaded)).startswith("bot is a base model: it was not trained on")
    assert checkpoint.warning(dataclasses.replace(loaded, stage="sft")) is None
    info = checkpoint.inspect("bot", 1)
    assert (info.folder, info.step, info.stage, info.path) == (folder, 1, "base", folder / "checkpoints" / "1")
    assert checkpoint.infer_config(info) == CONFIG and checkpoint.load_tokenizer(info) == TOK


def test_loaded_and_restored_parameters_carry_the_config(base: Path):
    config = dataclasses.replace(CONFIG, n_layer=12, window_pattern="L", sequence_len=512)
    folder = save_run(base, config=config) / "checkpoints"
    tokens = TEXT.repeat(1, 8)  # beyond a short window
    want = model.apply(random_params(config, 1), tokens)
    params, meta, _ = checkpoint.load_params(folder)
    meta_state = convert.Weights(torch.tensor(0), model.init(config, 0, device="meta"))
    bare_state = meta_state._replace(params=tree.unflatten(tree.flatten(meta_state.params)))
    states = [checkpoint.restore(folder, state)[0] for state in (meta_state, bare_state)]
    for restored in (params, *(state.params for state in states), checkpoint.load("bot", device="cpu").params):
        assert torch.equal(model.apply(restored, tokens), want)
    assert ModelConfig(**meta["model"]) == config


def test_run_is_found_by_name_by_path_or_as_the_one_saved_last(base: Path, tmp_path: Path):
    old, new = save_run(base, "old", steps=(9,)), save_run(base, "new", steps=(3, 4))
    elsewhere = save_run(tmp_path / "elsewhere", "old", steps=(5,))
    (base / "runs" / "empty").mkdir()
    (base / "runs" / "notes.txt").touch()
    set_time(old, 9, 1000)
    set_time(new, 3, 5000)  # only the last step of a run counts
    set_time(new, 4, 900)
    assert checkpoint.list_runs() == [old, new]
    assert checkpoint.find_run() == old
    set_time(new, 4, 2000)
    assert checkpoint.load().name == "new"
    assert checkpoint.find_run("old") == old and checkpoint.find_run(old) == old
    assert checkpoint.load(elsewhere).step == 5
    assert checkpoint.find_run(str(elsewhere)) == elsewhere


def test_matrices_are_cast_and_logits_equal_those_of_training(base: Path):
    params = random_params(CONFIG)
    save_run(base, params=params)
    assert {x.dtype for x in tree.leaves(checkpoint.load("bot", device="cpu").params)} == {torch.float32}
    loaded = checkpoint.load("bot", dtype=torch.bfloat16)
    for name, leaf in tree.flatten(loaded.params).items():
        assert leaf.dtype == (torch.bfloat16 if leaf.dim() == 2 else torch.float32), name
    compute = Compute(dtype=torch.bfloat16)
    want = model.apply(params, TEXT, config=CONFIG, compute=compute)
    assert torch.equal(model.apply(loaded.params, TEXT, config=loaded.config, compute=compute), want)


def test_embedding_rows_beyond_the_tokenizer_are_removed(base: Path):
    config = dataclasses.replace(CONFIG, vocab_size=500)
    params = random_params(config)
    save_run(base, config=config, params=params)
    loaded = checkpoint.load("bot")
    assert loaded.config == CONFIG
    assert loaded.params["wte"].shape == (320, 32) and loaded.params["wte"].untyped_storage().nbytes() == 320 * 32 * 4
    got, want = (model.apply(p, TEXT, config=c) for p, c in ((loaded.params, loaded.config), (params, config)))
    assert torch.allclose(got, want[..., : TOK.vocab_size], atol=1e-6)


def test_converted_run_loads_and_without_tokenizer_is_refused(base: Path):
    params = random_params(CONFIG, 3)
    torch.save(reference.to_reference(params, CONFIG), base / "model.pt")
    (base / "meta.json").write_text(json.dumps({"step": 7, "model_config": dataclasses.asdict(CONFIG)}))
    config = convert.Config(model=str(base / "model.pt"), meta=str(base / "meta.json"), name="mute")
    convert.run(config, distributed.init("cpu"))
    with pytest.raises(UserError, match=r"mute/checkpoints/7 has no tokenizer.*--set ranks="):
        checkpoint.load("mute")
    tokenizer.save(TOK, base)
    (base / "ranks").write_text((base / "tokenizer.txt").read_text().partition("\n")[2])
    convert.run(dataclasses.replace(config, name="fluent", ranks=str(base / "ranks")), distributed.init("cpu"))
    loaded = checkpoint.load("fluent")
    assert loaded.step == 7 and loaded.tokenizer == TOK
    assert_trees_close(loaded.params, params, rtol=0)


def refused(run: str | None = None, step: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(run, step=step, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_runs_and_steps_name_what_there_is(base: Path):
    made_by = "`python launch.py --experiment=quickstart` makes one"
    half = base / "runs" / "half" / "checkpoints" / "1.orbax-checkpoint-tmp" / "state"
    assert refused().startswith(f"no trained model in {base / 'runs'}: {made_by}")
    assert refused("bot") == f"run=bot: no such run in {base / 'runs'}; {made_by}"
    half.mkdir(parents=True)
    assert refused().startswith("no trained model in")
    message = refused("half")
    assert "has no complete checkpoint" in message and "--resume" in message and message.endswith(made_by)
    save_run(base, "quickstart", steps=(3, 6))
    assert refused("half").endswith("; other runs have: quickstart")
    assert refused("quikstart").endswith(f"no such run in {base / 'runs'}; did you mean quickstart?")
    assert refused("d20").endswith("; there are: quickstart")
    assert "no such run" in refused("tests"), "a folder here is no run unless it has checkpoints"
    assert refused("quickstart", 5).endswith("there are steps 3, 6")
    assert checkpoint.load().name == "quickstart"


@pytest.mark.parametrize("lost", ["meta/metadata", "files/tokenizer.txt", "state"])
def test_incomplete_checkpoint_names_an_intact_step(base: Path, lost: str):
    folder = save_run(base, steps=(3, 6))
    (folder / "checkpoints" / "6" / lost).rename(base / "lost")
    message = refused("bot")
    assert message.startswith(f"checkpoint {folder / 'checkpoints' / '6'}: ")
    assert message.endswith("or load it: --set step=3")
    assert checkpoint.load("bot", step=3).step == 3


DEEPER = random_params(dataclasses.replace(CONFIG, n_layer=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tok=Tokenizer((*TOK.tokens, b"zz"))), "the tokenizer has 268 tokens, the model 267"),
        (dict(tok=Tokenizer(TOK.tokens, specials=("<|bos|>",))), "the tokenizer has no <|user_start|>"),
        (dict(params=DEEPER), "has params.resid_lambdas (3), this model expects (2)"),
        (dict(model={**dataclasses.asdict(CONFIG), "n_experts": 8}), "'n_experts'); update nanochat?"),
        (dict(model=None), "no model config that this version knows"),
    ],
    ids=["vocabulary", "specials", "deeper", "newer", "strange"],
)
def test_inconsistent_checkpoint_is_refused(base: Path, options: dict[str, Any], message: str):
    save_run(base, **options)
    assert message in refused("bot")
