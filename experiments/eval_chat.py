"""Evaluate a trained model on the chat tasks, and sum them up as ChatCORE.

    python launch.py --experiment=eval_chat                                          # the run that was saved last
    torchrun launch.py --experiment=eval_chat --set run=d20 --set tasks=gsm8k,mmlu --set max_problems=100
    python launch.py --experiment=eval_chat --set source=/data/tasks                 # local copies, no network
    python launch.py --experiment=eval_chat --set tasks=gsm8k --set samples=8 --set temperature=1      # pass@8

Multiple choice looks at the likelihood of the letters; the other tasks are answered, greedily and through the tools,
and the answers checked, programs in the sandbox. ChatCORE is the mean of ARC-Easy, ARC-Challenge, MMLU, GSM8K and
HumanEval, each counted from guessing (0) to perfect (1). A task is named as in nanochat/tasks, with options behind
colons: gsm8k:/data/gsm8k_test.parquet, arithmetic:size=500; source is a file or folder for all that the hub has.

A task that fails, for want of a network for example, is left out and named at the end; what is done is kept, and the
same command goes on from there. Writes eval/chat_<step>.csv and a line of evaluations.jsonl to the run's folder. The
model of the quickstart takes half a minute of one CPU core for max_problems=40; the tests have 19,000 in all.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat import checkpoint, distributed, eval, metrics, tasks
from nanochat.config import UserError
from nanochat.eval import CHAT_CORE, TITLES, ChatEvalConfig
from nanochat.text import format_duration

if TYPE_CHECKING:
    from nanochat.checkpoint import Pretrained
    from nanochat.distributed import ControlGroup, Runtime


@dataclasses.dataclass(frozen=True)
class Config(ChatEvalConfig):
    """What to evaluate, and on what.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. step: none: its newest.
        tasks: names, with options behind colons. source: file or folder of their rows; none: the hub.
        device, dtype: auto, or as in `runtime.create`.
    """

    run: str | None = None
    step: int | None = None
    tasks: tuple[str, ...] = (*CHAT_CORE, "spellingbee")
    source: Path | None = None
    device: str = "auto"
    dtype: str = "auto"


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Evaluate each task that is not done yet, write the results, and say what is missing."""
    names = [label(text) for text in config.tasks]
    if not names or len(set(names)) < len(names):
        raise UserError(f"tasks={','.join(config.tasks)}: expected one task or more, each once")
    line = distributed.create_group()
    with distributed.raise_on_any_failure(line):
        bot = checkpoint.load(config.run, step=config.step, device=runtime.device, dtype=runtime.compute_dtype)
    print(checkpoint.describe_model(bot))
    if warning := checkpoint.warning(bot):
        print(warning)
    partial = bot.folder / "eval" / f"chat_{bot.step}.partial.jsonl"
    scores = opened(partial, settings(config, bot, runtime), line)
    print(f"\n{'task':<18}{'accuracy':>10}{'centered':>10}")
    found, failed = evaluated(config, bot, runtime, line, scores, partial)
    with distributed.raise_on_any_failure(line):
        if runtime.is_main:
            write(bot, found, failed, partial)
    core = eval.chat_eval.chat_core(found)
    if core is not None:
        print(f"{'ChatCORE':<18}{core:>10.4f}")
    limits = {"max_problems": config.max_problems, "max_generative": config.max_generative}
    limited = " and ".join(f"{name}={limit}" for name, limit in limits.items() if limit)
    print(f"\nwritten: {csv_file(bot)}" + (f" ({limited}: not of all problems)" if limited else ""))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} tasks failed: {', '.join(failed)} (each says why above); the same command "
            "goes on with these"
        )
    print(f"next: python launch.py --experiment=chat --set run={bot.name}")


def evaluated(
    config: Config, bot: Pretrained, runtime: Runtime, line: ControlGroup, done: Mapping[str, eval.Score], partial: Path
) -> tuple[dict[str, eval.Score], dict[str, str]]:
    """Return (the scores by name, the reasons of those that failed); each task is shown, and kept in `partial`."""
    subject = eval.ModelUnderTest(bot.params, bot.config, bot.tokenizer, runtime.compute_dtype)
    decoder = functools.cache(lambda: eval.chat_eval.start(subject, config))
    scores: dict[str, eval.Score] = {}
    failed: dict[str, str] = {}
    for text in config.tasks:
        name, started = label(text), time.perf_counter()
        try:
            if name not in done:
                with distributed.raise_on_any_failure(line):
                    task = tasks.from_text(text, "test", source=config.source)
                scores[name] = eval.chat_eval.score(subject, task, config, decoder, line, show=True)
        except distributed.LostRankError:
            raise
        except UserError as error:
            failed[name] = str(error)
            print(f"{TITLES.get(name, name):<18}    failed: {error}", flush=True)
            continue
        if name in done:
            scores[name] = done[name]
            ending = "done before"
        else:
            ending = format_duration(time.perf_counter() - started)
            with distributed.raise_on_any_failure(line):
                if runtime.is_main:
                    keep(partial, {"task": name} | scores[name]._asdict())
        score = scores[name]
        print(
            f"{TITLES.get(name, name):<18}{score.accuracy:>10.2%}{score.centered:>10.4f}    "
            f"{score.right} of {score.total}, {ending}",
            flush=True,
        )
    return scores, failed


def label(text: str) -> str:
    """Return the name of a task's result: as it was asked for, but for where its rows lie."""
    return ":".join(word for word in text.split(":") if "/" not in word and not word.endswith((".parquet", ".jsonl")))


def settings(config: Config, bot: Pretrained, runtime: Runtime) -> dict[str, Any]:
    """Return all that results depend on, as JSON holds it."""
    state = checkpoint.read_header(bot.folder / "checkpoints" / str(bot.step))["state"]
    fields = [field.name for field in dataclasses.fields(ChatEvalConfig) if field.name != "compile"]
    values = {name: getattr(config, name) for name in fields}
    values |= {"source": str(config.source), "dtype": str(runtime.compute_dtype)}
    return values | {"checkpoint": state["params.lm_head"]["fingerprint"]}


def opened(partial: Path, settings: Mapping[str, Any], line: ControlGroup) -> dict[str, eval.Score]:
    """Return the scores that an earlier process has left with the same settings; begins the file if there are none."""
    with distributed.raise_on_any_failure(line):
        scores = []
        if line.rank == 0:
            lines = kept(partial)
            if lines[:1] == [dict(settings)]:
                scores = [[row["task"], row["right"], row["total"], row["baseline"]] for row in lines[1:]]
            else:
                if lines:
                    print(f"{partial} is of another checkpoint or other settings: its results are left out")
                partial.unlink(missing_ok=True)
                keep(partial, settings)
    return {name: eval.Score(*values) for name, *values in distributed.broadcast_object(line, scores)}


def kept(partial: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; it may end in a torn one, of a process that was killed."""
    try:
        lines = partial.read_text("utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{partial} cannot be read ({error}); delete it to start anew") from None


def keep(partial: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the file of results."""
    try:
        partial.parent.mkdir(exist_ok=True)
        text = partial.read_text("utf-8") if partial.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        partial.write_text(f"{whole}{json.dumps(row)}\n", "utf-8")
    except OSError as error:
        raise UserError(f"{partial} cannot be written ({error.strerror})") from None


def csv_file(bot: Pretrained) -> Path:
    """Return where the table of results goes."""
    return bot.folder / "eval" / f"chat_{bot.step}.csv"


def write(bot: Pretrained, scores: Mapping[str, eval.Score], failed: Mapping[str, str], partial: Path) -> None:
    """Write the table and the record; what an interrupted evaluation leaves is dropped once nothing is missing."""
    rows: list[Sequence[Any]] = [("Task", "Accuracy", "Centered", "Right", "Total")]
    for name, s in scores.items():
        rows.append((TITLES.get(name, name), f"{s.accuracy:.6f}", f"{s.centered:.6f}", s.right, s.total))
    core = eval.chat_eval.chat_core(scores)
    if core is not None:
        rows.append(("ChatCORE", "", f"{core:.6f}", "", ""))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    try:
        csv_file(bot).write_text(text.getvalue(), "utf-8")
        if not failed:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{csv_file(bot)} cannot be written ({error.strerror})") from None
    named = {TITLES.get(name, name): reason for name, reason in failed.items()}
    metrics.logger.append_evaluation(bot.folder, bot.step, bot.stage, eval.chat_eval.as_metrics(scores), named)
