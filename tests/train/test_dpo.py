"""Preference optimization: the losses by hand, pairs of every format, and tiny runs with and without adapters."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ranks
import tiny_run
import torch
from small_model import CONFIG, random_params

from experiments import dpo, rl
from nanochat import checkpoint, distributed, model, tasks, train, tree
from nanochat.config import UserError, override
from nanochat.metrics import logger
from nanochat.tasks import conversations
from nanochat.train.dpo import Objective, Pair
from nanochat.train.rl import Row, padded

# Two pairs: log-probabilities of (chosen, rejected) are (-1, -2) and (-6, -3), the reference's (-2, -2) and (-4, -4).
LOG_PROBS, REFERENCE = torch.tensor([-1.0, -2, -6, -3]), torch.tensor([-2.0, -2, -4, -4])
TOKENS = torch.tensor([1, 2, 4, 2])


@pytest.mark.parametrize(
    ("objective", "h", "losses"),
    [
        (Objective(beta=0.5), (1.0, -3.0), (math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.5)))),
        (
            Objective(beta=0.5, label_smoothing=0.1),
            (1.0, -3.0),
            (
                0.9 * math.log(1 + math.exp(-0.5)) + 0.1 * math.log(1 + math.exp(0.5)),
                0.9 * math.log(1 + math.exp(1.5)) + 0.1 * math.log(1 + math.exp(-1.5)),
            ),
        ),
        (Objective("ipo", beta=0.5), (1.0, -3.0), (0.0, 16.0)),
        (Objective("ipo", beta=0.5, length_normalized=True), (1.0, -1.0), (0.0, 4.0)),
        (Objective("ipo", beta=0.5, nll_weight=2), (1.0, -3.0), (0.0 + 2 * 1 / 1, 16.0 + 2 * 6 / 4)),
    ],
)
def test_losses_of_two_pairs_by_hand(objective: Objective, h: Any, losses: Any):
    got, margins = train.dpo.pair_losses(LOG_PROBS, REFERENCE, TOKENS, objective)
    torch.testing.assert_close(got, torch.tensor(losses))
    torch.testing.assert_close(margins, 0.5 * torch.tensor(h))


def test_loss_of_a_model_is_that_of_the_log_probabilities_of_its_answers():
    params, start = random_params(seed=1), random_params()
    rows = [Row([5, 6, 7, 8], [0, 0, 1, 1]), Row([5, 6, 9], [0, 0, 1]), Row([3, 4, 5], [0, 1, 1]), Row([3, 9], [0, 1])]

    def by_hand(params: model.Params) -> torch.Tensor:
        values = []
        for ids, weights in rows:
            logits = torch.log_softmax(model.apply(params, torch.tensor([ids]))[0], -1)
            values.append(sum(logits[i - 1, ids[i]] for i in range(1, len(ids)) if weights[i]))
        return torch.stack(values)

    reference = torch.tensor(train.dpo.log_probs(start, rows, 3, torch.device("cpu")))
    torch.testing.assert_close(reference, by_hand(start), rtol=1e-5, atol=1e-5)
    batch = padded(rows, 4) | {"reference": reference}
    got, _ = train.dpo.preference_loss(params, batch, objective=Objective(beta=0.3), config=CONFIG)
    h = 0.3 * (by_hand(params) - by_hand(start)).view(2, 2).diff(dim=1)[:, 0]  # rejected minus chosen
    torch.testing.assert_close(got, torch.log1p(h.exp()).mean(), rtol=1e-5, atol=1e-6)
    pairs, runtime = [Pair(*rows[:2]), Pair(*rows[2:])], distributed.init("cpu")
    values = train.dpo.evaluate(params, start, pairs, Objective(beta=0.3), 1, runtime)
    assert values["loss"] == pytest.approx(float(got), rel=1e-4) and values["kl"] > 0
    assert values["margin"] == pytest.approx(float(-h.mean()), rel=1e-4)
    same = train.dpo.evaluate(start, start, pairs, Objective(), 2, runtime)
    assert (same["accuracy"], same["kl"], same["margin"]) == (0.5, 0, 0)


ASK, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "A"), ("assistant", "B"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "A", "rejected": "B"},
        {"messages": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [ASK], "chosen": GOOD, "rejected": BAD, "score": 1},
        {"prompt": "Hi", "prompt_id": "1", "messages": [ASK, GOOD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
)
def test_formats_of_pairs_mean_the_same(row: dict[str, Any], tmp_path: Path):
    want = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
    assert conversations.preference_from_row(row) == want
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert tasks.read_preferences(file) == [want]


def test_answers_before_the_last_ones_are_given_and_equal_answers_skipped():
    chat = [ASK, {"role": "assistant", "content": "Hello."}, ASK]
    row = conversations.preference_from_row({"messages": chat, "chosen": "A", "rejected": "B"})
    same = {**row, "rejected": row["chosen"]}
    [pair], skipped = train.dpo.render([row, same], tiny_run.TOK, 64, "truncate")
    assert skipped == 1
    learned = [token for token, weight in zip(*pair.chosen) if weight]
    assert tiny_run.TOK.decode(learned) == "A<|assistant_end|>"
    assert train.dpo.render([row], tiny_run.TOK, len(pair.chosen.ids) - 2, "truncate") == ([], 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "A", "rejected": "B"}, "no prompt: expected prompt or messages"),
        ({"prompt": "Hi", "chosen": "A"}, "keys prompt, chosen; expected prompt or messages, chosen and rejected"),
        ({"prompt": "Hi", "chosen": "A", "rejected": [ASK]}, "rejected: the last message must be the assistant's"),
    ],
)
def test_invalid_pairs_are_named_with_their_row(row: dict[str, Any], message: str, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", "chosen": "A", "rejected": "B"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"pairs.jsonl: row 2: .*{message}"):
        tasks.read_preferences(file)
    with pytest.raises(UserError, match="preference data: train on it with --experiment=dpo"):
        conversations.from_row({"prompt": "Hi", "chosen": "A", "rejected": "B"})


# Tiny runs

RUN = (
    "run=chat", "device=cpu", "compile=false", "eval.every_steps=none", "eval.tokens=600", "eval.sample_tokens=4",
    "eval.prompts=the cat", "pairs_per_step=4", "device_batch_size=2", "num_iterations=4", "metrics.every_steps=1",
    "checkpoint.every_steps=2", "optim.matrix_lr=0.02", "optim.unembedding_lr=0.01", "optim.lr_fraction=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tiny_run.save_run(folder, "chat", stage="sft")
        rows = [{"prompt": f"Say {i}", "chosen": f"yes {i}!", "rejected": f"no {i}."} for i in range(60)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder


def optimize(base: Path, *more: str) -> Path:
    config = override(dpo.Config(), [*RUN, f"pairs={base / 'pairs.jsonl'}", *more])
    dpo.run(config, distributed.init("cpu"))
    return train.run_folder(str(config.name))


@pytest.mark.parametrize("rank", [0, 2])
def test_run_learns_the_preference_and_resumes_exactly(base: Path, rank: int):
    lora = (f"lora.rank={rank}", "lora.lr=0.02")
    whole = optimize(base, f"name=whole{rank}", *lora)
    rows = logger.read(whole)
    losses = logger.curve(rows, "train/loss")[1]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < 0.6
    last = {name.removeprefix("val/preference_"): x for name, x in rows[-1].items()}
    assert last["accuracy"] > 0.9 and last["margin"] > 0 and last["kl"] > 0
    assert last["log_prob_chosen"] > last["log_prob_rejected"]
    assert checkpoint.load(whole).stage == "dpo" and bool(checkpoint.inspect(whole).meta.get("lora")) == bool(rank)
    with tiny_run.stop_after(1):
        optimize(base, f"name=part{rank}", *lora)
    tiny_run.assert_same_run(whole, optimize(base, f"name=part{rank}", *lora, "resume=true", "run=none"))


def run_on_ranks(settings: list[str]) -> None:
    with distributed.distributed_context("cpu") as runtime:
        dpo.run(override(dpo.Config(), settings), runtime)


@pytest.mark.slow
def test_two_ranks_match_one_process(base: Path):
    one = optimize(base, "name=one", "num_iterations=2")
    settings = [*RUN, f"pairs={base / 'pairs.jsonl'}", "num_iterations=2", "name=two", "sharding.mode=zero2"]
    ranks.call(2, run_on_ranks, settings, env={"NANOCHAT_BASE_DIR": str(base)})
    first, second = (logger.read(run) for run in (one, base / "runs" / "two"))
    for name in ("train/loss", "val/preference_kl", "val/preference_margin"):
        assert logger.curve(first, name)[1] == pytest.approx(logger.curve(second, name)[1], rel=1e-2)


def test_pairs_are_sampled_once_from_answers_of_different_reward(base: Path, monkeypatch: Any, capsys: Any):
    by_length = lambda task: lambda row, text: float(len(text))  # noqa: E731 (an untrained model solves nothing)
    monkeypatch.setattr(train.rl, "correct_reward", by_length)
    sampled = ("name=sampled", "pairs=task:arithmetic:size=12", "rollout.samples_per_prompt=3", "rollout.max_tokens=6",
               "num_iterations=1", "held_out=0.3", "lora.rank=2")  # fmt: skip
    folder = optimize(base, *sampled)
    [file] = folder.glob("pairs_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert 6 <= len(rows) <= 12 and "sampling 3 answers to 12 prompts" in capsys.readouterr().out
    text = [tasks.plain_text(row[side][0]["content"]) for row in rows[:1] for side in ("chosen", "rejected")]
    assert len(text[0]) > len(text[1])
    optimize(base, *sampled, "num_iterations=2", "resume=true")
    assert "sampling" not in capsys.readouterr().out


def test_ultrafeedback_is_read_from_local_files(base: Path, tmp_path: Path):
    for split in ("train", "test"):
        rows = [{"prompt": f"Say {i}", "chosen": [{"role": "user", "content": f"Say {i}"}, GOOD],
                 "rejected": [{"role": "user", "content": f"Say {i}"}, BAD]} for i in range(6)]  # fmt: skip
        (tmp_path / "data").mkdir(exist_ok=True)
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, tmp_path / "data" / f"{split}_prefs-00000-of-00001.parquet")
    folder = optimize(base, "name=hub", "pairs=ultrafeedback", f"source={tmp_path}", "num_iterations=1")
    assert checkpoint.steps(folder / "checkpoints") == [1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pairs=/none.jsonl", "pairs=/none.jsonl: no such file; expected ultrafeedback, a file, or task:NAME"),
        ("pairs_per_step=5", "pairs_per_step=5: not a multiple of device_batch_size=2 x 1 ranks"),
        ("held_out=0", "to train on, 0 held out: more are needed"),
        ("train.attention=flex", "train.attention=flex: answers have many lengths"),
    ],
)
def test_invalid_settings_raise_one_line_error(base: Path, setting: str, message: str):
    with pytest.raises(UserError, match=message):
        optimize(base, "name=wrong", setting)
    with pytest.raises(UserError, match=r"label_smoothing=0.1: is of loss=dpo"):
        dpo.Config(loss="ipo", label_smoothing=0.1)


def test_reinforcement_learning_trains_adapters(base: Path, monkeypatch: Any):
    monkeypatch.setattr(train.rl, "correct_reward", lambda task: lambda row, text: float(len(text)))
    settings = ("run=chat", "name=rl", "task=arithmetic", "device=cpu", "compile=false", "num_iterations=2",
                "rollout.prompts_per_step=2", "rollout.samples_per_prompt=3", "rollout.max_tokens=6",
                "eval.problems=2", "lora.rank=2", "lora.lr=0.01")  # fmt: skip
    rl.run(override(rl.Config(), settings), distributed.init("cpu"))
    state, meta = tiny_run.saved_state(train.run_folder("rl"))
    assert set(state.opt_state.keys()) == {"step", "matrix", "unembedding"} and meta["stage"] == "rl"
    assert any(x.any() for name, x in tree.flatten(state.params).items() if name.endswith(".b"))
