"""Evaluate a base model: samples, bits per byte on both splits, and CORE.

    python launch.py --experiment=eval_base                                      # the run that was saved last
    torchrun --nproc_per_node=8 launch.py --experiment=eval_base --set run=d20
    python launch.py --experiment=eval_base --set run=quickstart --set max_per_task=50 --set tasks=core
    python launch.py --experiment=eval_base --set bundle=/data/eval_bundle       # no network

CORE is the mean over 22 tasks of the accuracy counted from guessing (0) to perfect (1): GPT-2 (1.5B) has 0.2565. Its
bundle is downloaded once. Bits per byte are of the data that the run was trained on, or of `source`.

A task of CORE that is done is kept, and not done again while model, rows and settings are the same; one that fails is
left out and named at the end, and the same command goes on with it. Writes core_<step>.csv and samples_<step>.jsonl to
eval/ in the run's folder, and a line to its evaluations.jsonl. All rows at depth 20 take minutes on 8 H100; on a CPU,
set max_per_task.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanochat import checkpoint, data, distributed, eval, infer, metrics, model, train
from nanochat.config import UserError
from nanochat.data import DataConfig, sources, tokenizer
from nanochat.eval import core_bundle
from nanochat.text import format_duration

if TYPE_CHECKING:
    from nanochat.checkpoint import Pretrained
    from nanochat.distributed import ControlGroup, Runtime
    from nanochat.eval import Bundle, Results

BPB_TOKENS = 40 * 2**19  # of a model whose run does not say


@dataclasses.dataclass(frozen=True)
class Config:
    """What to evaluate, and on what.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. step: none: its newest.
        tasks: of samples, bpb and core.
        bundle: of CORE, a folder; none: the published one. max_per_task: rows of each task; none: all.
        max_tokens: of a prompt, of which the last are kept; none: as many as the model takes.
        tokens_per_batch: of CORE, computed at once; none: what is fast. overwrite: do again what is done.
        source, text_column: of the data for bits per byte; none: the run's. tokens: of each split; none: as many as
            the run validated with. device_batch_size: rows of them at once.
        prompts: of the greedy samples, of sample_tokens each. free_samples: of the model left to itself, at
            temperature 1, of free_tokens each.
        device, dtype: auto, or as in `runtime.create`.
    """

    run: str | None = None
    step: int | None = None
    tasks: tuple[Literal["samples", "bpb", "core"], ...] = ("samples", "bpb", "core")
    bundle: Path | None = None
    max_per_task: int | None = None
    max_tokens: int | None = None
    tokens_per_batch: int | None = None
    overwrite: bool = False
    source: str | None = None
    text_column: str | None = None
    tokens: int | None = None
    device_batch_size: int = 16
    prompts: tuple[str, ...] = train.PROMPTS
    sample_tokens: int = 16
    free_samples: int = 8
    free_tokens: int = 128
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        least = {"tokens": 1, "device_batch_size": 1, "sample_tokens": 1, "free_samples": 0, "free_tokens": 1}
        least |= {"max_per_task": 1, "max_tokens": 2, "tokens_per_batch": 1}
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {value}")


@dataclasses.dataclass(frozen=True)
class Job:
    """What the parts share: settings, model, place in the job, a line to the other ranks, the checkpoint's header."""

    config: Config
    bot: Pretrained
    runtime: Runtime
    line: ControlGroup
    header: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.bot.folder / "eval"


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Do each part, record what was found, and say what is missing."""
    line = distributed.create_group()
    if config.bundle is not None and "core" in config.tasks:
        with distributed.raise_on_any_failure(line):
            core_bundle.read(config.bundle)  # a wrong one is said before anything is done
    with distributed.raise_on_any_failure(line):
        bot = checkpoint.load(config.run, step=config.step, device=runtime.device, dtype=runtime.compute_dtype)
        header = checkpoint.read_header(bot.folder / "checkpoints" / str(bot.step))
    print(checkpoint.describe_model(bot))
    job = Job(config, bot, runtime, line, header)
    parts: dict[str, Callable[[Job], tuple[dict[str, float], dict[str, str]]]]
    parts = {"samples": samples, "bpb": bits_per_byte, "core": core_score}
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, part in parts.items():
        if name in config.tasks:
            try:
                values, reasons = part(job)
                found, failed = found | values, failed | reasons
            except distributed.LostRankError:
                raise
            except UserError as error:
                failed[name] = str(error)
                print(f"{name} failed: {error}", flush=True)
    if found or failed:
        with distributed.raise_on_any_failure(line):
            if runtime.is_main:
                metrics.logger.append_evaluation(bot.folder, bot.step, bot.stage, found, failed)
        print(f"recorded in {bot.folder / metrics.logger.EVALUATIONS_FILE}")
    if failed:
        partly = any(name.startswith("core/") for name in failed)
        mean = ", and with it CORE, a mean over all its tasks" if partly else ""
        raise UserError(
            f"{len(failed)} failed: {', '.join(failed)}{mean}; each says why above, and the same command does it again"
        )
    print(f"next: python launch.py --experiment=sft --set run={bot.name}, or --experiment=report --set run={bot.name}")


# Samples


def samples(job: Job) -> tuple[dict[str, float], dict[str, str]]:
    """Print and write what the model makes of the prompts, and of none. One rank does it, the others wait."""
    with distributed.raise_on_any_failure(job.line):
        if job.runtime.is_main:
            rows = sampled(job)
            write(job.folder / f"samples_{job.bot.step}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
            for row in rows:
                print(f"  {row['prompt']!r} → {row['completion']!r}")
    return {}, {}


def sampled(job: Job) -> list[dict[str, Any]]:
    """Return {"prompt", "completion", "temperature", "seed"} of each sample."""
    config, tok = job.config, job.bot.tokenizer
    asked = [(text, config.sample_tokens, 0.0) for text in config.prompts]
    asked += [("", config.free_tokens, 1.0)] * config.free_samples
    requests = [
        infer.Request((tok.bos, *tok.encode(text)), max_tokens, temperature, top_k=0, seed=seed)
        for seed, (text, max_tokens, temperature) in enumerate(asked)
    ]
    slots = max(min(8, len(requests)), 1)
    decoder = infer.start(job.bot.params, job.bot.config, tok, slots=slots, compile=False, exact=True)
    said: dict[Any, list[int]] = {key: [] for key in range(len(requests))}
    for event in infer.run(decoder, requests):
        if event.finish != "stop":
            said[event.key].append(event.token)
    return [
        {"prompt": text, "completion": tok.decode(said[seed]), "temperature": temperature, "seed": seed}
        for seed, (text, _, temperature) in enumerate(asked)
    ]


# Bits per byte


def bits_per_byte(job: Job) -> tuple[dict[str, float], dict[str, str]]:
    """Return bits per byte of both splits."""
    settings = job.header["meta"].get("config", {})
    data = DataConfig()
    names = [name for name in ("source", "text_column", "buffer_docs") if f"data.{name}" in settings]
    data = dataclasses.replace(data, **{name: settings[f"data.{name}"] for name in names})
    given = {name: getattr(job.config, name) for name in ("source", "text_column")}
    data = dataclasses.replace(data, **{name: value for name, value in given.items() if value is not None})
    tokens = job.config.tokens or settings.get("eval.tokens") or BPB_TOKENS
    found: dict[str, float] = {}
    for split in ("train", "val"):
        found[f"{split}/bpb"] = split_bits_per_byte(job, data, split, tokens, settings.get("seed", 42))
        print(f"{split}: {found[f'{split}/bpb']:.4f} bits per byte of {data.source}", flush=True)
    return found, {}


def split_bits_per_byte(job: Job, source: DataConfig, split: Literal["train", "val"], tokens: int, seed: int) -> float:
    """Return bits per byte on the first `tokens` tokens of a split: the same whole rows on any number of ranks.

    Raises:
        UserError: the data is not there, or cannot be read.
    """
    import torch

    bot, runtime, rows = job.bot, job.runtime, job.config.device_batch_size
    with distributed.raise_on_any_failure(job.line):
        sources.shards_of(source, split)
    stream = data.loader.batches(
        source, bot.tokenizer, split=split,
        rows_per_step=rows * runtime.world_size, sequence_len=bot.config.sequence_len,
        seed=seed, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
    )  # fmt: skip
    total = max(tokens // bot.config.sequence_len, 1)
    errors: list[UserError] = []

    def counted() -> Iterator[dict[str, Any]]:
        # An error is raised when all ranks are done: the others wait for this one in a sum.
        numbers = torch.arange(rows, device=runtime.device) * runtime.world_size + runtime.rank
        for first in range(0, total, rows * runtime.world_size):
            try:
                batch = next(stream)[0]
            except UserError as error:
                errors.append(error)
                return
            outside = (first + numbers >= total)[:, None]
            yield {"inputs": batch["inputs"], "targets": batch["targets"].masked_fill(outside, model.IGNORE)}

    chunk_tokens = 1024 if runtime.device.type == "cpu" else 8192
    how = {"config": bot.config, "compute": model.Compute(runtime.compute_dtype), "chunk_tokens": chunk_tokens}
    token_bytes = torch.from_numpy(tokenizer.token_bytes(bot.tokenizer)).to(runtime.device)
    bpb = 0.0
    with contextlib.closing(stream):
        try:
            bpb = model.loss.bits_per_byte(
                bot.params, counted(), token_bytes, functools.partial(model.loss.next_token, **how)
            )
        except ValueError as error:  # no target stands for a byte
            errors.append(UserError(f"{split}: {error}"))
    with distributed.raise_on_any_failure(job.line):
        if errors:
            raise errors[0]
    return bpb


# CORE


def core_score(job: Job) -> tuple[dict[str, float], dict[str, str]]:
    """Return CORE and its tasks' scores; each task is shown, and kept, when it is done."""
    config, bot = job.config, job.bot
    with distributed.raise_on_any_failure(job.line):
        if config.bundle is None and job.runtime.local_rank == 0:
            core_bundle.fetch()
    with distributed.raise_on_any_failure(job.line):
        bundle = core_bundle.read(config.bundle or core_bundle.default_dir())
    kept_file = job.folder / f"core_{bot.step}.partial.jsonl"
    with distributed.raise_on_any_failure(job.line):
        keys = task_keys(job, bundle) if job.runtime.is_main else {}
        kept = opened(kept_file, keys, overwrite=config.overwrite) if job.runtime.is_main else {}
    keys, kept = distributed.broadcast_object(job.line, [keys, kept])
    done = {label: eval.TaskResult(**row) for label, row in kept.items()}
    counter = itertools.count(1)
    print(f"\n{'task':<40}{'accuracy':>10}{'centered':>10}")

    def show(label: str, outcome: eval.TaskResult | str, ending: str = "") -> None:
        head = f"{next(counter):>2}/{len(bundle.entries)} {label:<34}"
        if isinstance(outcome, str):
            print(f"{head} failed: {outcome}", flush=True)
            return
        ending = ending or format_duration(outcome.seconds)
        print(f"{head}{outcome.accuracy:>10.2%}{outcome.centered:>10.4f}    {outcome.rows} rows, {ending}", flush=True)

    def show_and_keep(label: str, outcome: eval.TaskResult | str) -> None:
        show(label, outcome)
        if isinstance(outcome, eval.TaskResult) and job.runtime.is_main:
            keep(kept_file, keys[label], outcome)

    for label, outcome in done.items():
        show(label, outcome, "done before")
    results = eval.core.evaluate(
        bot.params, bot.config, bot.tokenizer, bundle, max_per_task=config.max_per_task, max_tokens=config.max_tokens,
        tokens_per_batch=config.tokens_per_batch, compute=model.Compute(job.runtime.compute_dtype), done=done,
        on_task=show_and_keep,
    )  # fmt: skip
    table = job.folder / f"core_{bot.step}.csv"
    with distributed.raise_on_any_failure(job.line):
        if job.runtime.is_main:
            write(table, eval.core.to_csv(results))
    print("\n".join(summary(config, results, table)))
    return as_metrics(results), {f"core/{label}": reason for label, reason in results.failed.items()}


def summary(config: Config, results: Results, table: Path) -> Sequence[str]:
    """Return the lines below the tasks."""
    lines = [] if results.core is None else [f"   {'CORE':<47}{results.core:>10.4f}"]
    limits = [] if config.max_per_task is None else [f"at most {config.max_per_task} rows a task"]
    count = len(results.tasks) + len(results.failed)
    limits += [] if count == core_bundle.NUM_TASKS else [f"{count} of the {core_bundle.NUM_TASKS} published tasks"]
    if limits and results.core is not None:
        lines.append(f"   of {' and '.join(limits)}: not to be compared with published numbers")
    return [*lines, f"written: {table}"]


def as_metrics(results: Results) -> dict[str, float]:
    """Return the scores by the names of the record."""
    found = {} if results.core is None else {"core/CORE": results.core}
    for label, task in results.tasks.items():
        found |= {f"core/{label}": task.centered, f"core/{label}/accuracy": task.accuracy}
    return found


def task_keys(job: Job, bundle: Bundle) -> dict[str, str]:
    """Return label -> a digest of all that decides a task's result, of those tasks that can be read."""
    leaves = {name: leaf["fingerprint"] for name, leaf in job.header["state"].items() if name.startswith("params.")}
    model = [leaves, job.bot.tokenizer.fingerprint, str(job.runtime.compute_dtype), job.config.max_tokens]
    keys = {}
    for label in bundle.entries:
        with contextlib.suppress(UserError):  # it is said when the task's turn has come
            digest = core_bundle.task_hash(core_bundle.load(bundle, label, job.config.max_per_task))
            keys[label] = hashlib.sha256(json.dumps([model, digest]).encode()).hexdigest()
    return keys


def opened(path: Path, keys: Mapping[str, str], *, overwrite: bool) -> dict[str, dict[str, Any]]:
    """Return what an earlier process has kept of these very tasks: label -> the fields of its result.

    Raises:
        UserError: the file cannot be read or removed.
    """
    try:
        if overwrite:
            path.unlink(missing_ok=True)
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
        return {
            row["label"]: {k: x for k, x in row.items() if k != "key"}
            for row in rows
            if row["key"] == keys.get(row["label"])
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): set overwrite=true to start anew") from None


def keep(path: Path, key: str, result: eval.TaskResult) -> None:
    """Add a result to the file of those that are done; a line torn by a kill goes."""
    row = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "answers"}
    text = path.read_text("utf-8") if path.exists() else ""
    write(path, f"{text[: text.rfind(chr(10)) + 1]}{json.dumps({'key': key} | row)}\n")


def write(path: Path, text: str) -> None:
    """Put `text` in the place of a file, in one piece. Raises: UserError."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
