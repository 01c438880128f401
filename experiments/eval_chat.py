"""Evaluate a model on chat tasks, and summarize them as ChatCORE.

    python launch.py --experiment=eval_chat                                          # the newest run
    torchrun launch.py --experiment=eval_chat --set run=d20 --set tasks=gsm8k,mmlu --set max_problems=100
    python launch.py --experiment=eval_chat --set source=/data/tasks                 # local copies, no network
    python launch.py --experiment=eval_chat --set tasks=gsm8k --set samples=8 --set temperature=1      # pass@8

Multiple choice compares the logits of the letters. Other tasks generate answers, greedily and with tools, and check
them; programs run in the sandbox. ChatCORE is the mean of ARC-Easy, ARC-Challenge, MMLU, GSM8K and HumanEval, each
centered from random guessing (0) to perfect (1). Where answers end with a number, a second, lenient score counts the
right number in any form, as $18.00 without the #### that is taught. Tasks are named as in nanochat/tasks, with options
after colons: gsm8k:/data/gsm8k_test.parquet, arithmetic:size=500.

A task that fails, for example without a network, is skipped and listed at the end; the same command resumes and skips
finished tasks. Writes eval/chat_<step>.csv and a line of evaluations.jsonl to the run's folder. The quickstart's model
takes half a minute on one CPU core with max_problems=40; the test splits have 19,000 problems in all.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat import checkpoint, distributed, eval, jsonl, metrics, tasks, train
from nanochat.config import UserError
from nanochat.eval import CHAT_CORE, TITLES, ChatEvalConfig
from nanochat.text import format_duration, table_row

if TYPE_CHECKING:
    from nanochat.checkpoint import Pretrained
    from nanochat.distributed import Runtime
    from nanochat.eval import Score


@dataclasses.dataclass(frozen=True)
class Config(ChatEvalConfig, checkpoint.LoadConfig):
    """What to evaluate; see also `ChatEvalConfig`.

    Attributes:
        tasks: names, with options after colons.
        source: local file or folder of the tasks' rows; none: the hub.
    """

    tasks: tuple[str, ...] = (*CHAT_CORE, "spellingbee")
    source: Path | None = None


config = Config


def run(config: Config, runtime: Runtime) -> None:
    names = {text: result_name(text) for text in config.tasks}
    if not names or len(set(names.values())) < len(config.tasks):
        raise UserError(f"tasks={','.join(config.tasks)}: expected at least one task, each once")
    with distributed.raise_on_any_failure():
        loaded = checkpoint.load(config.run, step=config.step, device=runtime.device, dtype=runtime.compute_dtype)
        info = checkpoint.inspect(loaded.folder, loaded.step)
    print(checkpoint.describe_model(loaded))
    train.build.advise_all_gpus(runtime)
    if warning := checkpoint.warning(loaded):
        print(warning)
    partial = loaded.folder / "eval" / f"chat_{loaded.step}.partial.jsonl"
    model_key = eval.results.model_key(info, loaded.tokenizer, runtime.compute_dtype)
    settings = [getattr(config, field.name) for field in dataclasses.fields(ChatEvalConfig) if field.name != "compile"]
    keys = {text: eval.results.key(model_key, settings, str(config.source), text) for text in names}
    scores, failed = evaluate(config, loaded, runtime, keys, partial)
    path = loaded.folder / "eval" / f"chat_{loaded.step}.csv"
    with distributed.raise_on_any_failure():
        if runtime.is_main:
            jsonl.write_atomic(path, to_csv(scores))
            if not failed:
                partial.unlink(missing_ok=True)
            reasons = {TITLES.get(name, name): reason for name, reason in failed.items()}
            values = eval.chat_eval.as_metrics(scores)
            metrics.logger.append_evaluation(loaded.folder, loaded.step, loaded.stage, values, reasons)
    if (core := eval.chat_eval.chat_core(scores)) is not None:
        print(table_row(["ChatCORE", "", f"{core:.4f}"], eval.results.WIDTHS))
    limits = {"max_problems": config.max_problems, "max_generative": config.max_generative}
    limited = " and ".join(f"{name}={limit}" for name, limit in limits.items() if limit)
    print(f"\nwritten: {path}" + (f" ({limited}: not of all problems)" if limited else ""))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} tasks failed: {', '.join(failed)}; the reasons are above, and the same "
            "command retries them"
        )
    print(f"next: python launch.py --experiment=chat --set run={loaded.name}")


def evaluate(
    config: Config, loaded: Pretrained, runtime: Runtime, keys: Mapping[str, str], partial: Path
) -> tuple[dict[str, Score], dict[str, str]]:
    """Return (scores by name, reasons of failed tasks); each task is printed and saved to `partial`."""
    finished = eval.results.read_finished(partial, keys)
    model = eval.ModelUnderTest(loaded.params, loaded.config, loaded.tokenizer, runtime.compute_dtype)
    engine = functools.cache(lambda: eval.chat_eval.start_engine(model, config))
    scores: dict[str, Score] = {}
    failed: dict[str, str] = {}
    print("\n" + table_row(["task", "accuracy", "centered"], eval.results.WIDTHS))
    for text in config.tasks:
        name, start, status = result_name(text), time.perf_counter(), "done before"
        title = TITLES.get(name, name)
        try:
            if text in finished:
                score = eval.Score(**{field: x for field, x in finished[text].items() if field in eval.Score._fields})
            else:
                with distributed.raise_on_any_failure():
                    task = tasks.from_text(text, "test", source=config.source)
                score = eval.chat_eval.score(model, task, config, engine, show_progress=True)
                status = format_duration(time.perf_counter() - start)
                with distributed.raise_on_any_failure():
                    if runtime.is_main:
                        jsonl.append(partial, {"key": keys[text], "task": name, **score._asdict()})
        except distributed.LostRankError:
            raise
        except UserError as error:
            failed[name] = str(error)
            print(f"  {title} failed: {error}", flush=True)
            continue
        scores[name] = score
        lenient = "" if score.lenient is None else f", {score.lenient} by the lenient check"
        shortened = f", {score.shortened} questions shortened to the context" if score.shortened else ""
        status = f"{score.right} of {score.total}{lenient}{shortened}, {status}"
        print(eval.results.line(title, score.accuracy, score.centered, status), flush=True)
    return scores, failed


def result_name(text: str) -> str:
    """Return the name of a task's result: the task as requested, without the path of its rows."""
    name, _, words = tasks.split_text(text)
    return ":".join([name, *words])


def to_csv(scores: Mapping[str, Score]) -> str:
    """Return the scores as CSV, with a last line ChatCORE if all of its tasks are there."""
    rows = [(TITLES.get(name, name), s.accuracy, s.centered, s.right, s.total, s.lenient) for name, s in scores.items()]
    core = eval.chat_eval.chat_core(scores)
    mean = [] if core is None else [("ChatCORE", "", core, "", "", "")]
    return eval.results.csv_text([("Task", "Accuracy", "Centered", "Right", "Total", "Lenient"), *rows, *mean])
