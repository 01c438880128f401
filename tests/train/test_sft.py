"""Batches of conversations: loss masks, packing, weights, ranks, and resuming a loader."""

import dataclasses
import itertools
import re
from collections import Counter
from typing import Any

import pytest
import torch
from small_model import CONFIG, random_params
from torch import Tensor

from nanochat import transform, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer, chat_format, tokenizer
from nanochat.model import loss
from nanochat.tasks import Task, qa_conversation
from nanochat.train import Packing, sft

TEXT = "What is the sum of one and two? It is three. Who are you? I am a small model, and I count."
PACKING = Packing(rows_per_step=4, micro_rows=2, sequence_len=48, buffer_conversations=7)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.train([TEXT] * 20, 300)


def row(index: int) -> chat_format.Conversation:
    """A conversation whose length and words depend on its index."""
    words = TEXT.split()
    question, answer = " ".join(words[: 1 + index % 5]), " ".join(words[index % 7 : index % 7 + 1 + index % 9])
    return qa_conversation(f"{index}: {question}", answer)


def task(size: int = 50) -> Task:
    return Task("made", "chat", size, row)


def collect(tok: Tokenizer, packing: Packing = PACKING, task: Task = task(), **options: Any) -> list[Any]:
    return list(sft.batches(task, tok, packing, **options))


def documents(tok: Tokenizer, inputs: Tensor, targets: Tensor) -> list[tuple[int, ...]]:
    """Return the conversations in packed rows, as ids."""
    result = []
    last = targets[:, -1:]
    for ids in torch.cat([inputs, torch.where(last < 0, tok.bos, last)], dim=1).tolist():
        starts = [i for i, token in enumerate(ids) if token == tok.bos] + [len(ids)]
        pieces = [tuple(ids[a:b]) for a, b in itertools.pairwise(starts)]
        result += [piece for piece in pieces if len(piece) > 1]
    return result


@pytest.mark.parametrize("assistant_only", [True, False])
def test_targets_are_the_next_tokens_under_the_loss_mask(tok: Tokenizer, assistant_only: bool):
    parts = [{"type": "text", "text": "It is"}, {"type": "python", "text": "1+2"}]
    parts += [{"type": "python_output", "text": "3"}, {"type": "text", "text": " three."}]
    conversation = qa_conversation("What is it?", parts)
    ids, mask = chat_format.render(tok, conversation)
    packing = Packing(rows_per_step=1, micro_rows=1, sequence_len=40, assistant_only=assistant_only)
    [(batch, _, stats)] = collect(tok, packing, Task("one", "chat", 1, lambda _: conversation))
    assert {name: x.dtype for name, x in batch.items()} == {
        "inputs": torch.int64, "targets": torch.int64, "weights": torch.float32
    }  # fmt: skip
    padding = [tok.bos] * (41 - len(ids))
    assert batch["inputs"][0].tolist() == [*ids, *padding][:-1]
    learned = [token if m or not assistant_only else -1 for token, m in zip(ids, mask)][1:]
    assert batch["targets"][0].tolist() == [*learned, *[-1] * len(padding)]
    assert stats["last"] == 1 and stats["learned_tokens"] == sum(token >= 0 for token in learned)


def test_every_conversation_is_packed_once_without_cropping(tok: Tokenizer):
    wanted = Counter(tuple(chat_format.render(tok, row(i), PACKING.sequence_len)[0]) for i in range(50))
    packing = PACKING._replace(assistant_only=False)
    packed = Counter[tuple[int, ...]]()
    for batch, _, _ in collect(tok, packing):
        packed.update(documents(tok, batch["inputs"], batch["targets"]))
    assert packed == wanted


def test_long_conversation_is_truncated_and_one_without_targets_dropped(tok: Tokenizer):
    long = Task("long", "chat", 2, lambda i: qa_conversation(TEXT * (1 + 3 * i), "yes"))
    packing = Packing(1, 1, len(chat_format.render(tok, long.row(0))[0]))
    got = collect(tok, packing, long)  # which reads ahead: of the second, the question alone is longer than a row
    assert len(got) == 1 and got[0][2]["dropped"] == 1
    assert got[-1][1]["position"]["read"] == 2 and got[-1][1]["position"]["dropped"] == 1


KEEPS = "longer than 40 tokens; a base model with a longer model.sequence_len keeps them"


@pytest.mark.parametrize(
    ("long", "kept", "skipped"),
    [
        ("truncate", [19, 40, 40], [f"2 of 3 conversations (66.7%) shortened: {KEEPS}"]),
        (
            "whole_turns",
            [19, 37],
            [f"1 of 3 conversations (33.3%) {what}: {KEEPS}" for what in ("dropped", "shortened")],
        ),
        (
            "drop",
            [19],
            [
                "2 of 3 conversations (66.7%) dropped: "
                + KEEPS.replace("a base", "long_conversations=whole_turns or a base")
            ],
        ),
    ],
)
def test_long_conversations_are_shortened_or_dropped_and_counted(
    tok: Tokenizer, long: Any, kept: list[int], skipped: list[str]
):
    exchange = [{"role": "user", "content": "Who are you?" * 2}, {"role": "assistant", "content": "I count."}]
    texts = [exchange * 4, [exchange[0], {"role": "assistant", "content": TEXT}], exchange]
    rows = Task("long", "chat", 3, lambda i: {"messages": texts[i]})
    packing = Packing(1, 1, 40, long_conversations=long, assistant_only=False)
    got = collect(tok, packing, rows)
    pieces = [len(piece) for batch, *_ in got for piece in documents(tok, batch["inputs"], batch["targets"])]
    assert sorted(pieces) == kept and got[-1][1]["position"]["skipped"] == skipped


@pytest.mark.parametrize("epochs", [1, 3, None])
@pytest.mark.parametrize(
    ("answer", "options", "why"),
    [
        ({}, {}, "12 of 12 conversations (100.0%) dropped: longer than 40 tokens; a base model"),
        (
            {"weight": 0},
            {"sequence_len": 4000},
            "12 of 12 conversations (100.0%) dropped: their answers are all switched off",
        ),
        (
            {},
            {"long_conversations": "drop"},
            "12 of 12 conversations (100.0%) dropped: longer than 40 tokens; long_conversations=whole",
        ),
    ],
)
def test_nothing_to_learn_in_an_epoch_raises(tok: Tokenizer, epochs: Any, answer: Any, options: Any, why: str):
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "yes", **answer}]
    rows = Task("mine", "chat", 12, lambda _: {"messages": messages})
    packing = Packing(2, 1, 40, epochs=epochs)._replace(**options)
    for rank in range(2):
        with pytest.raises(UserError, match=f"mine: none of the 12 conversations has anything .*: {re.escape(why)}"):
            next(sft.batches(rows, tok, packing, rank=rank, world_size=2))


def test_micro_batch_gradients_average_to_batch_gradient(tok: Tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=tok.vocab_size, sequence_len=48)
    params = random_params(config)
    batch, _, _ = collect(tok)[0]
    grad = transform.value_and_grad(lambda p, b: loss.next_token(p, b, config=config)[0])
    whole, value = grad(params, {name: x for name, x in batch.items() if name != "weights"})
    parts = [grad(params, {name: x[i : i + 2] for name, x in batch.items()}) for i in (0, 2)]
    torch.testing.assert_close((parts[0][1] + parts[1][1]) / 2, value)
    for (name, x), a, b in zip(tree.flatten(whole).items(), tree.leaves(parts[0][0]), tree.leaves(parts[1][0])):
        torch.testing.assert_close((a + b) / 2, x, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_split_the_rows_of_a_single_process(tok: Tokenizer, world_size: int):
    one = collect(tok, PACKING._replace(micro_rows=1))
    ranks = [collect(tok, PACKING._replace(micro_rows=1), rank=r, world_size=world_size) for r in range(world_size)]
    for step, (batch, state, stats) in enumerate(one):
        for name, x in batch.items():
            shares = torch.stack([rank[step][0][name] for rank in ranks], dim=1).flatten(0, 1)
            assert torch.equal(shares, x), name
        assert all(rank[step][1:] == (state, stats) for rank in ranks)


@pytest.mark.parametrize("epochs", [1, 3])
def test_restored_loader_continues_bit_for_bit(tok: Tokenizer, epochs: int):
    packing = PACKING._replace(epochs=epochs)
    unbroken = collect(tok, packing)
    assert [stats.get("last") for *_, stats in unbroken] == [None] * (len(unbroken) - 1) + [1.0]
    shares = [stats["share"] for *_, stats in unbroken]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1
    for stop in range(1, len(unbroken)):
        rest = collect(tok, packing, state=unbroken[stop - 1][1])
        assert len(rest) == len(unbroken) - stop
        for (batch, state, stats), (want, state_there, stats_there) in zip(rest, unbroken[stop:]):
            assert all(torch.equal(batch[name], x) for name, x in want.items())
            assert state == state_there and stats == stats_there
    assert collect(tok, packing, state=unbroken[-1][1]) == []


def test_no_epoch_limit_repeats_the_task(tok: Tokenizer):
    taken = list(itertools.islice(sft.batches(task(5), tok, PACKING._replace(epochs=None)), 20))
    assert len(taken) == 20 and all("share" not in stats and "last" not in stats for *_, stats in taken)
    assert taken[-1][2]["epoch"] > 5


def test_invalid_settings_and_state_raise(tok: Tokenizer):
    with pytest.raises(UserError, match="4 rows per step are not divisible into micro-batches of 3 rows on 1 ranks"):
        collect(tok, PACKING._replace(micro_rows=3))
    state = collect(tok)[0][1]
    with pytest.raises(UserError, match=r"cannot resume with other data .conversations was 50, is 49"):
        collect(tok, task=task(49), state=state)
    with pytest.raises(UserError, match="long_conversations was truncate, is drop"):
        collect(tok, PACKING._replace(long_conversations="drop"), state=state)
    del state["position"]["made_of"]["long_conversations"]  # as in the states of earlier versions
    assert len(collect(tok, state=state)) == len(collect(tok)) - 1
    with pytest.raises(UserError, match="no training targets"):
        collect(tok, task=task(0))
