"""What a step saw: the very rows of training, and the loss and gradient of each document."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import recorded_steps
import tiny_run
import torch

from experiments import _replay, inspect, sft
from nanochat import checkpoint, distributed, model, train, tree
from nanochat.config import UserError, override
from nanochat.metrics import logger

LINES = [
    {"messages": [{"role": "user", "content": f"the {word}"}, {"role": "assistant", "content": f"{word}, it sat"}]}
    for word in tiny_run.WORDS * 8
]


@pytest.fixture(scope="module")
def recorded(corpus: Path) -> dict[int, Any]:
    """The rows of each step of a run of eight, stopped after step 4 and resumed."""
    more = ("checkpoint.keep_last=none", "eval.every_steps=100", "num_iterations=8")
    lines = [json.dumps({"text": f"a cat and {word} under it"}) for word in tiny_run.WORDS * 20]
    (corpus / "other.jsonl").write_text("\n".join(lines))
    more += (f"data.source=0.7*{corpus / 'text'},0.3*{corpus / 'other.jsonl'}",)
    with recorded_steps.recorded() as rows:
        with tiny_run.stop_after(4):
            tiny_run.pretrain_run(*more)
        tiny_run.pretrain_run(*more, "resume=true")
    return dict(enumerate(rows, start=1))


def inspect_run(*settings: str) -> None:
    inspect.run(override(inspect.Config(), ["device=cpu", *settings]), distributed.init("cpu"))


def documents_of(run: str, step: int) -> list[dict[str, Any]]:
    lines = (train.run_folder(run) / "inspect" / f"step_{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_batch_of_any_step_is_the_one_of_training(recorded: dict[int, Any]):
    folder = train.run_folder("tiny")
    assert tiny_run.saved_steps(folder) == [3, 4, 6, 8] and len(recorded) == 8
    for number, rows in recorded.items():
        step = next(_replay.steps_after(folder, number - 1))
        assert (step.number, step.batch["inputs"].tolist()) == (number, rows)
    inspect_run("run=tiny", "step=8", "sort=row")
    shown: list[list[int]] = [[] for _ in recorded[8]]
    for document in documents_of("tiny", 8):
        shown[document["row"]] += document["tokens"]
    assert [row[:-1] for row in shown] == recorded[8]


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_training(recorded: dict[int, Any], capsys: pytest.CaptureFixture[str]):
    inspect_run("run=tiny", "step=7", "prompt=the cat", "answer=sat on the mat")
    text = capsys.readouterr().out
    row = next(row for row in logger.read(train.run_folder("tiny")) if row["step"] == 7)
    losses, norms = (
        [float(x) for x in re.search(rf"{name} ([\d.]+) \(([\d.]+) in training\)", text).groups()]  # pyright: ignore
        for name in ("loss of the batch", "norm of its gradient")
    )
    assert losses == pytest.approx([row["train/loss"]] * 2, abs=1e-4)
    assert norms == pytest.approx([row["train/grad_norm"]] * 2, rel=1e-3)
    documents = documents_of("tiny", 7)
    assert sum(d["share"] for d in documents) == pytest.approx(1, abs=1e-3)
    effects = [document["effect"] for document in documents]
    assert effects == sorted(effects, reverse=True) and effects[0] > 0
    for end in (documents[0], documents[-1]):  # what helped and what hurt: by finite differences
        check_document(end, len(recorded[7]))


@pytest.mark.slow
def test_gradients_are_computed_in_float32_in_place_of_float16(recorded: dict[int, Any]):
    inspect_run("run=tiny", "step=6")
    expected = documents_of("tiny", 6)
    inspect.run(override(inspect.Config(), ["device=cpu", "run=tiny", "step=6"]), distributed.init("cpu", "float16"))
    assert documents_of("tiny", 6) == expected


def test_branch_begins_with_the_data_of_its_base(recorded: dict[int, Any], corpus: Path):
    source = f"data.source=0.7*{corpus / 'text'},0.3*{corpus / 'other.jsonl'}"
    with recorded_steps.recorded() as rows:
        tiny_run.pretrain_run(
            source,
            "name=branch",
            "init_from=tiny@6",
            "num_iterations=8",
            "checkpoint.every_steps=100",
            "eval.every_steps=9",
        )
    assert rows == [recorded[7], recorded[8]]
    for number in (7, 8):
        assert (
            next(_replay.steps_after(train.run_folder("branch"), number - 1)).batch["inputs"].tolist()
            == recorded[number]
        )
    with pytest.raises(UserError, match="run branch begins after step 6 of tiny: --set run=tiny has its step 6"):
        inspect_run("run=branch", "step=6")


def check_document(document: dict[str, Any], rows: int) -> None:
    """Compare a document's numbers with those of a loss of its own."""
    loaded = checkpoint.load("tiny", step=6, device="cpu")
    length = loaded.config.sequence_len
    loss_fn = functools.partial(model.loss.next_token, config=loaded.config)
    step = next(_replay.steps_after(loaded.folder, 6))
    targets = torch.full((1, length), model.IGNORE)
    span = slice(document["start"], document["stop"])
    targets[0, span] = step.batch["targets"][document["row"], span]
    own = {"inputs": step.batch["inputs"][document["row"]][None], "targets": targets}
    grads, (loss, _) = torch.func.grad_and_value(loss_fn, has_aux=True)(loaded.params, own)
    assert document["loss"] == pytest.approx(float(loss), abs=1e-5)
    share = document["targets"] / (rows * length)  # of the batch's mean
    norm = sum(float(g.square().sum()) for g in tree.leaves(grads)) ** 0.5 * share
    assert document["grad_norm"] == pytest.approx(norm, rel=1e-4)
    tok = loaded.tokenizer
    prompt, answer = [tok.bos, *tok.encode("the cat")], tok.encode(" sat on the mat")
    ids = torch.tensor([[*prompt, *answer]])
    wanted = {"inputs": ids[:, :-1], "targets": ids[:, 1:].clone()}
    wanted["targets"][:, : len(prompt) - 1] = model.IGNORE
    size = 0.01 / norm
    sides = [tree.map(lambda p, g: p - sign * size * share * g, loaded.params, grads) for sign in (1, -1)]  # noqa: B023
    down, up = (float(loss_fn(side, wanted)[0]) for side in sides)
    assert document["effect"] == pytest.approx((up - down) / (2 * size), rel=0.05)


@pytest.mark.slow
def test_fine_tuning_batches_are_those_of_training(corpus: Path):
    (corpus / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    tiny_run.pretrain_run("name=base", "num_iterations=2", "eval.every_steps=100")
    config = override(
        sft.Config(),
        [
            *("run=base", "name=tuned", "compile=false", "device=cpu", "chat.tasks=none", "val_tasks=none"),
            *("checkpoint.every_steps=2", f"tasks=customjson:{corpus / 'lines.jsonl'}", "eval.prompts=none"),
        ],
    )
    with recorded_steps.recorded() as rows:
        sft.run(config, distributed.init("cpu"))
    folder = train.run_folder("tuned")
    for number in range(1, len(rows) + 1):
        assert next(_replay.steps_after(folder, number - 1)).batch["inputs"].tolist() == rows[number - 1]
    inspect_run("run=tuned", "step=3", "prompt=the cat", "answer=cat, it sat")
    documents = documents_of("tuned", 3)
    assert all(document["text"].startswith("<|user_start|>the ") for document in documents)
    assert documents[0]["effect"] > 0


@pytest.mark.slow
def test_data_that_changed_is_named(recorded: dict[int, Any], corpus: Path):
    path = corpus / "text" / "a.jsonl"
    before = path.read_text()
    path.write_text(before.replace("cat", "dog").replace("the", "this"))
    try:
        for step in (2, 8):  # from the beginning of the data, and from a checkpoint
            with pytest.raises(UserError, match=r"of tiny.*data was 2 shards .*, is 2 shards"):
                inspect_run("run=tiny", f"step={step}")
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["step=5"], r"step=5: bot has steps 1 to 3"),
        (["step=2"], "run bot was not trained here: it has no data on record"),
        (["run=rl", "step=2"], "run rl is of stage rl: what the model wrote or compared there is not stored"),
        (["run=branch", "step=2"], r"run branch begins after step 2 of trunk: --set run=trunk has its step 2"),
        (["sort=effect", "step=2"], "sort=effect: set prompt too"),
        ([], "run bot has no losses on record: set step"),
    ],
)
def test_what_cannot_be_inspected_is_named(base: Path, settings: list[str], message: str):
    loader = {"made_of": {}}
    tiny_run.save_run(base, "rl", steps=(3,), stage="rl", loader=loader)
    tiny_run.save_run(base, "branch", steps=(3,), loader=loader, settings={"init_from": "trunk@2"})
    tiny_run.save_run(base, "bot", steps=(3,))
    with pytest.raises(UserError, match=message):
        inspect_run("run=bot", *settings)
