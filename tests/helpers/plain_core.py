"""CORE in the plainest way, to compare with: a row at a time, every prompt whole through `model.apply`.

It shares no code with nanochat/eval/core.py: what the specification says is written down here once more.
"""

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from tensordict import TensorDict

from nanochat import model
from nanochat.data import Tokenizer
from nanochat.model import ModelConfig


class PlainRow(NamedTuple):
    """The result of a row: prompts, spans, and the answer with its losses."""

    prompts: list[list[int]]
    spans: list[tuple[int, int]]
    is_correct: bool
    losses: list[float]


@torch.no_grad()
def answers(
    bundle: Path, label: str, params: TensorDict, config: ModelConfig, tok: Tokenizer, max_tokens: int
) -> list[PlainRow]:
    """Return the answers to the rows of a task."""
    tasks = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
    (task,) = [task for task in tasks if task["label"] == label]
    kind, results = task["icl_task_type"], []
    lines = (bundle / "eval_data" / task["dataset_uri"]).read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(rows)
    for index, row in enumerate(rows):
        encoded = [[tok.bos, *tok.encode(text)] for text in prompt_texts(task, rows, index)]
        prompts, where = spans(kind, encoded)
        cut = [max(len(ids) - max_tokens, 0) for ids in prompts]
        prompts = [ids[n:] for ids, n in zip(prompts, cut)]
        where = [(max(start - n, 1), end - n) for (start, end), n in zip(where, cut)]
        losses, correct = [], []
        for ids, (start, end) in zip(prompts, where):
            logits = model.apply(params, torch.tensor([ids]), config=config)[0]
            before, targets = logits[start - 1 : end - 1], torch.tensor(ids[start:end], dtype=torch.int64)
            losses.append(F.cross_entropy(before, targets).item() if end > start else math.nan)
            correct.append(bool((before.argmax(-1) == targets).all()))
        best = min(range(len(losses)), key=lambda i: losses[i])
        is_correct = correct[0] if kind == "language_modeling" else best == row["gold"]
        results.append(PlainRow(prompts, where, is_correct, losses))
    return results


def prompt_texts(task: dict[str, Any], rows: list[dict[str, Any]], index: int) -> list[str]:
    kind, between = task["icl_task_type"], task.get("continuation_delimiter", " ")
    candidates = list(range(len(rows)))
    candidates.remove(index)
    shots = [rows[i] for i in random.Random(1234 + index).sample(candidates, task["num_fewshot"][0])]
    row, text = rows[index], ""
    if kind == "multiple_choice":
        for shot in shots:
            text += shot["query"] + between + shot["choices"][shot["gold"]] + "\n\n"
        return [text + row["query"] + between + choice for choice in row["choices"]]
    if kind == "schema":
        for shot in shots:
            text += shot["context_options"][shot["gold"]] + between + shot["continuation"] + "\n\n"
        return [text + option + between + row["continuation"] for option in row["context_options"]]
    for shot in shots:
        text += shot["context"].strip() + between + shot["continuation"] + "\n\n"
    text += row["context"].strip() + between
    return [text.strip(), text + row["continuation"]]


def spans(kind: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Return the prompts that are computed, and the span of the answer in each."""
    if kind == "language_modeling":
        without, whole = prompts
        assert whole[: len(without)] == without and len(whole) > len(without)
        return [whole], [(len(without), len(whole))]
    shortest, same = min(len(ids) for ids in prompts), 0
    if kind == "multiple_choice":
        while same < shortest and all(ids[same] == prompts[0][same] for ids in prompts):
            same += 1
        return prompts, [(same, len(ids)) for ids in prompts]
    while same < shortest and all(ids[-1 - same] == prompts[0][-1 - same] for ids in prompts):
        same += 1
    return prompts, [(len(ids) - same, len(ids)) for ids in prompts]
