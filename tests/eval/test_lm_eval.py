"""EleutherAI's lm-evaluation-harness has the numbers of our own scorer: against the server, on an exported folder."""

import json
from pathlib import Path
from typing import Any

import core_ranks
import engine_server
import httpx
import lm_eval_tasks
import pytest
import tiny_run
import torch
from small_engine import CONFIG, PARAMS, TOKENIZER
from small_model import random_params

from experiments import export
from nanochat import distributed, model
from nanochat.eval import core, likelihood
from nanochat.eval.core_bundle import CoreTask, Row
from nanochat.eval.likelihood import Prompt

# Rows of COPA (Roemmele et al., 2011), as the eval bundle has them.
ROWS = [
    ("The man turned on the faucet, therefore", ["the toilet filled with water.", "water flowed from the spout."], 1),
    ("The girl found a bug in her cereal, therefore", ["she poured milk in the bowl.", "she lost her appetite."], 1),
    ("The woman retired, therefore", ["she received her pension.", "she paid off her mortgage."], 0),
    ("The girl found a bug in her cereal, so", ["she ate it.", "she lost her appetite."], 1),
]


def greedy(text: str, n: int = 2) -> str:
    """Return the text that the model finds most likely after a text."""
    ids = [TOKENIZER.bos, *TOKENIZER.encode(text)]
    for _ in range(n):
        ids.append(int(model.apply(PARAMS, torch.tensor([ids]))[0, -1].argmax()))
    return TOKENIZER.decode(ids[-n:])


def evaluate(tasks: list[dict[str, Any]], url: str, kind: str = "local-completions", **args: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    args = {"model": "small", "base_url": url, "max_length": 256} | args
    manager = TaskManager(include_defaults=False)
    options: dict[str, Any] = {"bootstrap_iters": 0, "task_manager": manager, "log_samples": True}
    options |= {"batch_size": 3} if kind == "local-completions" else {"apply_chat_template": True}
    run: Any = lm_eval.simple_evaluate
    return run(model=kind, model_args=args, tasks=tasks, **options)


def task(path: Path, name: str, kind: str, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    file = path / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    metrics = [{"metric": fields.pop("metric"), "aggregation": "mean", "higher_is_better": True}]
    return {"task": name, "output_type": kind, "metric_list": metrics, "num_fewshot": 0} | source | fields


@pytest.mark.slow
def test_harness_gets_the_numbers_of_our_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen = [{"query": query, "choices": choices, "gold": gold} for query, choices, gold in ROWS]
    # Half of the continuations are what the model would say itself, as far as that is text.
    guessed = [(query, greedy(query)) for query, *_ in ROWS] + [(x, greedy(x)) for _, two, _ in ROWS for x in two]
    cloze = [{"context": text, "continuation": new} for text, new in guessed if new.isascii() and new.isprintable()]
    cloze = [row for row in cloze if row["continuation"].strip() == row["continuation"]]
    cloze += [{"context": query, "continuation": f"x{choices[gold]}"} for query, choices, gold in ROWS]
    tasks = [
        task(
            tmp_path, "choice", "multiple_choice", chosen, metric="acc",
            doc_to_text="{{query}}", doc_to_choice="{{choices}}", doc_to_target="gold",
        ),
        task(
            tmp_path, "cloze", "loglikelihood", cloze, metric="acc",
            doc_to_text="{{context}}", doc_to_target="{{continuation}}", target_delimiter="",
        ),
    ]  # fmt: skip
    says = task(
        tmp_path, "says", "generate_until", chosen[:2], metric="exact_match",
        doc_to_text="{{query}}", doc_to_target="{{gold}}", generation_kwargs={"until": ["\n\n"], "max_gen_toks": 6},
    )  # fmt: skip
    with engine_server.serve() as server:
        results = evaluate(tasks, f"{server.url}/v1/completions", tokenizer_backend="remote")
        chats = evaluate([says], f"{server.url}/v1/chat/completions", "local-chat-completions")
        asked = {"messages": [{"role": "user", "content": ROWS[0][0]}], "temperature": 0, "max_tokens": 6}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    assert chats["samples"]["says"][0]["resps"] == [[answer]]

    def prompt(text: str, continuation: str) -> Prompt:
        start, ids = len(TOKENIZER.encode(text)) + 1, [TOKENIZER.bos, *TOKENIZER.encode(text + continuation)]
        return Prompt(ids, start, len(ids))

    groups = [[prompt(query, f" {choice}") for choice in choices] for query, choices, _ in ROWS]
    ours = likelihood.score(PARAMS, CONFIG, groups)
    theirs = [[nats for nats, _ in sample["filtered_resps"]] for sample in results["samples"]["choice"]]
    for scored, logprobs in zip(ours, theirs, strict=True):
        assert logprobs == pytest.approx([-answer.nats for answer in scored], rel=1e-5)
    best = [min(range(2), key=lambda i: scored[i].nats) for scored in ours]
    expected = sum(choice == gold for choice, (*_, gold) in zip(best, ROWS)) / len(ROWS)
    assert results["results"]["choice"]["acc,none"] == expected

    bundle_rows = tuple(Row(number, row) for number, row in enumerate(cloze))
    questions = core.questions(
        CoreTask("cloze", "language_modeling", tmp_path, 0, "", 0.0, bundle_rows), TOKENIZER, 256
    )
    scores = likelihood.score(PARAMS, CONFIG, [question.prompts for question in questions])
    right = [score.n_correct_greedy == score.n_tokens for (score,) in scores]
    assert 0 < sum(right) < len(right)
    for sample, (score,), is_right in zip(results["samples"]["cloze"], scores, right, strict=True):
        ((logprob, is_greedy),) = sample["filtered_resps"]
        assert logprob == pytest.approx(-score.nats, rel=1e-5) and is_greedy == is_right
    assert results["results"]["cloze"]["acc,none"] == sum(right) / len(right)


LABELS = ["arc_easy", "copa", "lambada_openai"]


@pytest.mark.slow
def test_accuracies_of_an_exported_folder_are_equal(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(base))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    pytest.importorskip("accelerate", reason='pip install -e ".[dev]"')
    lm_eval = pytest.importorskip("lm_eval", reason='pip install -e ".[dev]"')
    config = core_ranks.small_config()
    params, tok = random_params(config), core_ranks.small_tokenizer()
    tiny_run.save_run(base, config=config, params=params, tok=tok)
    export.run(export.Config(run="bot"), distributed.init("cpu"))
    # Longer prompts than the training context, which the harness would cut.
    settings = f"pretrained={base / 'exports' / 'bot_hf'},trust_remote_code=True,add_bos_token=True,max_length=640"
    tasks = lm_eval_tasks.tasks(core_ranks.BUNDLE, LABELS, base)
    results = lm_eval.simple_evaluate("hf", settings, tasks, device="cpu", batch_size=16, bootstrap_iters=0)
    for label in LABELS:
        accuracy, ours = lm_eval_tasks.scores(params, config, tok, core_ranks.BUNDLE, label)
        assert results["results"][f"local_{label}"]["acc,none"] == pytest.approx(accuracy), label
        for row, theirs in zip(ours, results["samples"][f"local_{label}"], strict=True):
            for scored, (log_likelihood, greedy) in zip(row, theirs["filtered_resps"], strict=True):
                assert float(log_likelihood) == pytest.approx(-scored.nats, abs=1e-3)
                assert str(greedy) == str(scored.n_correct_greedy == scored.n_tokens)
