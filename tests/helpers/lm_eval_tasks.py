"""Rows of a CORE bundle as tasks of lm-evaluation-harness, and what our own scorer gives under the same template."""

import json
from pathlib import Path
from typing import Any

import yaml

from nanochat.data import Tokenizer
from nanochat.eval import likelihood
from nanochat.model import ModelConfig, ParamsLike


def tasks(bundle: Path, labels: list[str], folder: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return zero-shot task configs for `lm_eval.simple_evaluate(tasks=...)`, offline; `folder` keeps their rows."""
    configs = []
    for label in labels:
        task, rows = read(bundle, label, limit)
        path = folder / f"{label}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task": f"local_{label}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1},
        }
        between = task.get("continuation_delimiter", " ")
        if task["icl_task_type"] == "multiple_choice":
            config |= {"output_type": "multiple_choice", "target_delimiter": between, "doc_to_target": "gold"}
            config |= {"doc_to_text": lambda row: row["query"], "doc_to_choice": lambda row: row["choices"]}
        else:
            config |= {"output_type": "loglikelihood", "doc_to_text": lambda row: row["context"].strip()}
            config |= {"doc_to_target": lambda row, between=between: between + row["continuation"]}
        configs.append(config)
    return configs


def scores(
    params: ParamsLike, config: ModelConfig, tok: Tokenizer, bundle: Path, label: str, limit: int | None = None
) -> tuple[float, list[list[likelihood.Scored]]]:
    """Return the accuracy of `tasks` by `likelihood.score` (the likeliest sum, or greedy), and the scores by row."""
    task, rows = read(bundle, label, limit)
    between = task.get("continuation_delimiter", " ")
    right, results = 0, []
    for row in rows:
        if task["icl_task_type"] == "multiple_choice":
            texts = [(row["query"], between + choice) for choice in row["choices"]]
        else:
            texts = [(row["context"].strip(), between + row["continuation"])]
        prompts = []
        for text, answer in texts:
            # As the harness: trailing spaces belong to the answer, whose tokens are what the context's leave of all.
            context = [tok.bos, *tok.encode(text.rstrip())]
            ids = context + [tok.bos, *tok.encode(text + answer)][len(context) :]
            prompts.append(likelihood.Prompt(ids, len(context), len(ids)))
        (scored,) = likelihood.score(params, config, [prompts])
        results.append(scored)
        nats = [score.nats for score in scored]
        greedy = scored[0].n_correct_greedy == scored[0].n_tokens
        right += nats.index(min(nats)) == row["gold"] if "gold" in row else greedy
    return right / len(rows), results


def read(bundle: Path, label: str, limit: int | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a task's entry in core.yaml and its first rows."""
    entries = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
    (task,) = [entry for entry in entries if entry["label"] == label]
    lines = (bundle / "eval_data" / task["dataset_uri"]).read_text("utf-8").splitlines()[:limit]
    return task, [json.loads(line) for line in lines]
