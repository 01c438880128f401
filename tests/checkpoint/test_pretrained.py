"""A run's checkpoint as a model to use: what is found, in which dtype, and what is said where nothing is right."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from small_model import assert_trees_close, random_params
from trained_run import CONFIG, TEXT, TOK, save_run, set_time

from experiments import convert, pretrain
from nanochat import checkpoint, distributed, model, tree
from nanochat.checkpoint import convert as reference
from nanochat.config import UserError, override
from nanochat.data import Tokenizer, tokenizer
from nanochat.model import Compute, ModelConfig


def test_everything_comes_from_the_checkpoint(base: Path):
    folder = save_run(base, steps=(1, 2))
    tokenizer.save(Tokenizer(TOK.tokens[:256]), folder / "tokenizer")  # trained anew since
    bot = checkpoint.load("bot", device="cpu")
    assert (bot.name, bot.step, bot.stage, bot.folder) == ("bot", 2, "base", folder)
    assert bot.config == CONFIG and bot.tokenizer == TOK
    assert_trees_close(bot.params, random_params(CONFIG, 2), rtol=0)
    assert_trees_close(checkpoint.load("bot", step=1).params, random_params(CONFIG, 1), rtol=0)
    assert checkpoint.describe_model(bot) == (
        f"bot, step 2 (base): {model.count(CONFIG)['total'] / 1000:.3g}k parameters, 267 tokens of vocabulary, "
        "context 64, cpu float32"
    )


def test_loaded_and_restored_parameters_carry_the_config(base: Path):
    config = dataclasses.replace(CONFIG, n_layer=12, window_pattern="L", sequence_len=512)
    folder = save_run(base, config=config) / "checkpoints"
    tokens = TEXT.repeat(1, 8)  # beyond a short window
    want = model.apply(random_params(config, 1), tokens)
    params, meta, _ = checkpoint.load_params(folder)
    meta_state = convert.Weights(torch.tensor(0), model.init(config, 0, device="meta"))
    bare_state = meta_state._replace(params=tree.unflatten(tree.flatten(meta_state.params)))
    states = [checkpoint.restore(folder, state)[0] for state in (meta_state, bare_state)]
    for found in (params, *(state.params for state in states), checkpoint.load("bot", device="cpu").params):
        assert torch.equal(model.apply(found, tokens), want)
    assert ModelConfig(**meta["model"]) == config


def test_a_run_is_named_or_a_path_or_the_one_saved_last(base: Path, tmp_path: Path):
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


def test_dtype_of_matrices_and_tables_and_the_same_logits_as_in_training(base: Path):
    params = random_params(CONFIG)
    save_run(base, params=params)
    assert {x.dtype for x in tree.leaves(checkpoint.load("bot", device="cpu").params)} == {torch.float32}
    bot = checkpoint.load("bot", dtype=torch.bfloat16)
    for name, leaf in tree.flatten(bot.params).items():
        assert leaf.dtype == (torch.bfloat16 if leaf.dim() == 2 else torch.float32), name
    assert "bfloat16" in checkpoint.describe_model(bot)
    compute = Compute(dtype=torch.bfloat16)
    want = model.apply(params, TEXT, config=CONFIG, compute=compute)
    assert torch.equal(model.apply(bot.params, TEXT, config=bot.config, compute=compute), want)


def test_rows_of_the_tables_that_no_token_has_are_cut_off(base: Path):
    config = dataclasses.replace(CONFIG, vocab_size=500)
    params = random_params(config)
    save_run(base, config=config, params=params)
    bot = checkpoint.load("bot")
    assert bot.config == CONFIG
    assert bot.params["wte"].shape == (320, 32) and bot.params["wte"].untyped_storage().nbytes() == 320 * 32 * 4
    got, want = (model.apply(p, TEXT, config=c) for p, c in ((bot.params, bot.config), (params, config)))
    assert torch.allclose(got, want[..., : TOK.vocab_size], atol=1e-6)


def test_the_stage_is_the_checkpoints_and_only_a_base_model_comes_with_a_warning(base: Path):
    save_run(base, "chatty", stage="sft")
    bot = checkpoint.load("chatty")
    assert bot.stage == "sft" and checkpoint.warning(bot) is None and "(sft)" in checkpoint.describe_model(bot)
    save_run(base, "plain")
    warning = checkpoint.warning(checkpoint.load("plain"))
    assert warning is not None and "\n" not in warning
    assert warning.startswith("plain is a base model: it has never seen a conversation")
    assert "--experiment=generate" in warning


def test_a_pretraining_run_loads(base: Path):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["the", "a", "cat", "dog", "sat"], k=30)) for _ in range(100)]
    (base / "text").mkdir()
    for name, part in {"a": texts[:80], "val": texts[80:]}.items():
        (base / "text" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    tokenizer.save(TOK, base / "tokenizer")
    settings = [
        *("depth=2", "name=run", "compile=false", "num_iterations=1", "total_batch_size=64", "device_batch_size=2"),
        *("model.sequence_len=32", "model.aspect_ratio=32", "model.head_dim=32", "model.window_pattern=L"),
        *("eval.tokens=64", "eval.sample_tokens=1", "eval.prompts=a", "data.buffer_docs=20"),
        f"data.source={base / 'text'}",
    ]
    pretrain.run(override(pretrain.config(), settings), distributed.init("cpu"))
    bot = checkpoint.load(device="cpu")
    assert (bot.name, bot.step, bot.stage, bot.tokenizer) == ("run", 1, "base", TOK)
    assert bot.config == ModelConfig(32, TOK.vocab_size, 2, 2, 2, 64, "L")
    assert model.apply(bot.params, TEXT, config=bot.config).isfinite().all()


def test_a_converted_run_loads_and_one_without_tokenizer_says_how_to_get_it(base: Path):
    params = random_params(CONFIG, 3)
    torch.save(reference.to_reference(params, CONFIG), base / "model.pt")
    (base / "meta.json").write_text(json.dumps({"step": 7, "model_config": dataclasses.asdict(CONFIG)}))
    config = convert.Config(model=str(base / "model.pt"), meta=str(base / "meta.json"), name="mute")
    convert.run(config, distributed.init("cpu"))
    with pytest.raises(UserError, match=r"mute/checkpoints/7 has no tokenizer.*--set ranks="):
        checkpoint.load("mute")
    encoded = base / "ranks"
    tokenizer.save(TOK, base / "saved")
    encoded.write_text("\n".join((base / "saved" / "tokenizer.txt").read_text().splitlines()[1:]))
    convert.run(dataclasses.replace(config, name="fluent", ranks=str(encoded)), distributed.init("cpu"))
    bot = checkpoint.load("fluent")
    assert bot.step == 7 and bot.tokenizer == TOK
    assert_trees_close(bot.params, params, rtol=0)


# ---------------------------------------------------------------------------------------------------------------
# What is missing or damaged


def refused(run: str | None = None, step: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(run, step=step, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_run_at_all(base: Path):
    made_by = "`python launch.py --experiment=quickstart` makes one"
    assert refused().startswith(f"no trained model in {base / 'runs'}: {made_by}")
    assert refused("bot") == f"run=bot: no such run in {base / 'runs'}; {made_by}"
    (base / "runs" / "bot").mkdir(parents=True)
    assert refused().startswith("no trained model in")
    message = refused("bot")
    assert "has no complete checkpoint" in message and message.endswith(made_by)


def test_a_misspelt_run(base: Path):
    save_run(base, "quickstart")
    assert refused("quikstart").endswith(f"no such run in {base / 'runs'}; did you mean quickstart?")
    assert refused("d20").endswith("; there are: quickstart")
    assert "no such run" in refused("tests"), "a folder here is no run unless it has checkpoints"


def test_a_run_that_was_stopped_within_its_first_save(base: Path):
    save_run(base, "good")
    whole = base / "runs" / "good" / "checkpoints" / "1"
    half = base / "runs" / "half" / "checkpoints" / "1.orbax-checkpoint-tmp"
    half.parent.mkdir(parents=True)
    half.mkdir()
    (half / "state").mkdir()
    message = refused("half")
    assert "has no complete checkpoint" in message and "--resume" in message
    assert message.endswith("; other runs have: good")
    assert checkpoint.load().name == "good" and whole.is_dir()


def test_a_step_that_is_not_there(base: Path):
    save_run(base, steps=(3, 6))
    assert refused("bot", 5).endswith("there are steps 3, 6")


@pytest.mark.parametrize("lost", ["meta/metadata", "files/tokenizer.txt", "state"])
def test_a_checkpoint_copied_in_part(base: Path, lost: str):
    folder = save_run(base, steps=(3, 6))
    (folder / "checkpoints" / "6" / lost).rename(base / "lost")
    message = refused("bot")
    assert message.startswith(f"checkpoint {folder / 'checkpoints' / '6'}: ")
    assert message.endswith("or load it: --set step=3")
    assert checkpoint.load("bot", step=3).step == 3


def test_a_changed_byte(base: Path):
    folder = save_run(base, steps=(3,))
    largest = max((folder / "checkpoints/3/state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    message = refused()
    assert "there is no other step" in message and "step=" not in message


def test_parts_that_do_not_belong_together(base: Path):
    save_run(base, "vocabulary", tok=Tokenizer((*TOK.tokens, b"zz")))
    assert "the tokenizer has 268 tokens, the model 267" in refused("vocabulary")
    save_run(base, "specials", tok=Tokenizer(TOK.tokens, specials=("<|bos|>",)))
    assert "the tokenizer has no <|user_start|>" in refused("specials")
    save_run(base, "deeper", params=random_params(dataclasses.replace(CONFIG, n_layer=3)))
    assert "resid_lambdas is (3,), its model has (2,)" in refused("deeper")
    fewer = random_params(CONFIG)
    del fewer["lm_head"]
    save_run(base, "fewer", params=fewer)
    assert "lm_head is missing, its model has (320, 32)" in refused("fewer")
    save_run(base, "newer", model={**dataclasses.asdict(CONFIG), "n_experts": 8})
    assert "n_experts" in refused("newer") and "update nanochat" in refused("newer")
    save_run(base, "strange", model=None)
    assert "no shape of a model" in refused("strange")
