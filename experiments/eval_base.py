"""Evaluate a base model: samples, bits per byte of both splits, and CORE.

    python launch.py --experiment=eval_base                                      # the newest run
    torchrun --nproc_per_node=8 launch.py --experiment=eval_base --set run=d20
    python launch.py --experiment=eval_base --set run=quickstart --set max_per_task=50 --set tasks=core
    python launch.py --experiment=eval_base --set bundle=/data/eval_bundle       # no network

CORE is the mean of 22 tasks' accuracies, each centered from random guessing (0) to perfect (1): GPT-2 (1.5B) has
0.2565. Its bundle is downloaded once. Bits per byte use the data that the run was trained on, or `source`.

Finished CORE tasks are skipped when the same command runs again, while model, rows and settings are the same. A task
that fails is skipped and listed at the end. Writes core_<step>.csv and samples_<step>.jsonl to eval/ in the run's
folder, and a line to its evaluations.jsonl. All rows at depth 20 take minutes on 8 H100; on a CPU, set max_per_task.
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

from nanochat import checkpoint, data, distributed, eval, infer, jsonl, metrics, model, train
from nanochat.config import Device, Dtype, UserError
from nanochat.data import DataConfig
from nanochat.eval import core_bundle
from nanochat.text import format_duration

if TYPE_CHECKING:
    from nanochat.checkpoint import CheckpointInfo, Pretrained
    from nanochat.distributed import Runtime
    from nanochat.eval import Bundle, Results, TaskResult

BPB_TOKENS = 40 * 2**19  # for a model whose run does not set eval.tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """What to evaluate.

    Attributes:
        run: name or folder of a run; none: the newest.
        step: checkpoint step; none: the newest.
        tasks: any of samples, bpb and core.
        bundle: folder of the CORE eval bundle; none: download the published one.
        max_per_task: rows of each CORE task; none: all.
        max_tokens: longer CORE prompts keep their last tokens; none: what the model supports.
        tokens_per_batch: tokens in a CORE batch, padding included; none: a fast value for the device.
        overwrite: evaluate finished CORE tasks again.
        source: text source for bits per byte; none: the run's.
        text_column: text column of the source; none: the run's.
        tokens: number of tokens of each split for bits per byte; none: as many as the run's own evaluations.
        device_batch_size: sequences per device for bits per byte.
        prompts: prompts to complete greedily.
        sample_tokens: length of each completion.
        free_samples: number of samples without a prompt, at temperature 1.
        free_tokens: length of each sample without a prompt.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.
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
    device: Device = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        least = {"tokens": 1, "device_batch_size": 1, "sample_tokens": 1, "free_samples": 0, "free_tokens": 1}
        least |= {"max_per_task": 1, "max_tokens": 2, "tokens_per_batch": 1}
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {value}")


@dataclasses.dataclass(frozen=True)
class Context:
    """What the parts share."""

    config: Config
    loaded: Pretrained
    runtime: Runtime
    info: CheckpointInfo

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return self.loaded.folder / "eval"


config = Config


def run(config: Config, runtime: Runtime) -> None:
    """Evaluate each part, record the metrics, and report what failed."""
    with distributed.raise_on_any_failure():
        if config.bundle is not None and "core" in config.tasks:
            core_bundle.read(config.bundle)  # a wrong path fails before anything is evaluated
    with distributed.raise_on_any_failure():
        loaded = checkpoint.load(config.run, step=config.step, device=runtime.device, dtype=runtime.compute_dtype)
        info = checkpoint.inspect(loaded.folder, loaded.step)
    print(checkpoint.describe_model(loaded))
    context = Context(config, loaded, runtime, info)
    parts: dict[str, Callable[[Context], tuple[dict[str, float], dict[str, str]]]]
    parts = {"samples": write_samples, "bpb": bits_per_byte, "core": evaluate_core}
    results: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in [name for name in parts if name in config.tasks]:
        try:
            values, reasons = parts[name](context)
            results, failed = results | values, failed | reasons
        except distributed.LostRankError:
            raise
        except UserError as error:
            failed[name] = str(error)
            print(f"{name} failed: {error}", flush=True)
    if results or failed:
        with distributed.raise_on_any_failure():
            if runtime.is_main:
                metrics.logger.append_evaluation(loaded.folder, loaded.step, loaded.stage, results, failed)
        print(f"recorded in {loaded.folder / metrics.logger.EVALUATIONS_FILE}")
    if failed:
        core = ", and so CORE, the mean over all its tasks" if any(name.startswith("core/") for name in failed) else ""
        raise UserError(
            f"{len(failed)} failed: {', '.join(failed)}{core}; the reasons are above, and the same command retries them"
        )
    name = loaded.name
    print(f"next: python launch.py --experiment=sft --set run={name}, or --experiment=report --set run={name}")


# Samples


def write_samples(context: Context) -> tuple[dict[str, float], dict[str, str]]:
    """Print and write completions of the prompts and samples without a prompt; rank 0 generates, the others wait."""
    with distributed.raise_on_any_failure():
        if context.runtime.is_main:
            rows = generate_samples(context.config, context.loaded)
            path = context.folder / f"samples_{context.loaded.step}.jsonl"
            jsonl.write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))
            for row in rows:
                print(f"  {row['prompt']!r} → {row['completion']!r}")
    return {}, {}


def generate_samples(config: Config, loaded: Pretrained) -> list[dict[str, Any]]:
    """Return {"prompt", "completion", "temperature", "seed"} of each sample."""
    tok = loaded.tokenizer
    prompts = [(text, config.sample_tokens, 0.0) for text in config.prompts]
    prompts += [("", config.free_tokens, 1.0)] * config.free_samples
    requests = [
        infer.Request((tok.bos, *tok.encode(text)), max_tokens, temperature, top_k=0, seed=seed)
        for seed, (text, max_tokens, temperature) in enumerate(prompts)
    ]
    slots = max(min(8, len(requests)), 1)
    engine = infer.start(loaded.params, loaded.config, tok, slots=slots, compile=False, exact=True)
    completions = infer.complete(engine, requests)
    return [
        {"prompt": text, "completion": tok.decode(done.content), "temperature": temperature, "seed": seed}
        for seed, ((text, _, temperature), done) in enumerate(zip(prompts, completions))
    ]


# Bits per byte


def bits_per_byte(context: Context) -> tuple[dict[str, float], dict[str, str]]:
    """Return bits per byte of both splits."""
    settings = context.info.meta.get("config", {})
    names = ("source", "text_column", "buffer_docs")
    values = {name: settings[f"data.{name}"] for name in names if f"data.{name}" in settings}
    overrides = {"source": context.config.source, "text_column": context.config.text_column}
    values |= {name: value for name, value in overrides.items() if value is not None}
    source = dataclasses.replace(DataConfig(), **values)
    tokens = context.config.tokens or settings.get("eval.tokens") or BPB_TOKENS
    results: dict[str, float] = {}
    for split in ("train", "val"):
        results[f"{split}/bpb"] = split_bits_per_byte(context, source, split, tokens, settings.get("seed", 42))
        print(f"{split}: {results[f'{split}/bpb']:.4f} bits per byte of {source.source}", flush=True)
    return results, {}


def split_bits_per_byte(
    context: Context, source: DataConfig, split: Literal["train", "val"], tokens: int, seed: int
) -> float:
    """Return bits per byte of the first `tokens` tokens of a split: the same full rows on any number of ranks."""
    import torch

    loaded, runtime, rows = context.loaded, context.runtime, context.config.device_batch_size
    stream = data.loader.batches(
        source, loaded.tokenizer, split=split, rows_per_step=rows * runtime.world_size,
        sequence_len=loaded.config.sequence_len, seed=seed,
        rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
    )  # fmt: skip
    total = max(tokens // loaded.config.sequence_len, 1)

    def first_rows() -> Iterator[dict[str, Any]]:
        numbers = torch.arange(rows, device=runtime.device) * runtime.world_size + runtime.rank
        for first, (batch, *_) in zip(range(0, total, rows * runtime.world_size), stream):
            surplus = (first + numbers >= total)[:, None]
            yield {"inputs": batch["inputs"], "targets": batch["targets"].masked_fill(surplus, model.IGNORE)}

    chunk_tokens = 1024 if runtime.device.type == "cpu" else 8192
    options = {"config": loaded.config, "compute": model.Compute(runtime.compute_dtype), "chunk_tokens": chunk_tokens}
    loss = functools.partial(model.loss.next_token, **options)
    with contextlib.closing(stream), distributed.raise_on_any_failure():
        sums = eval.bpb.sum_nats(loaded.params, first_rows(), loaded.tokenizer, loss)
    return eval.bpb.over_ranks(*sums)


# CORE


def evaluate_core(context: Context) -> tuple[dict[str, float], dict[str, str]]:
    """Return CORE and the scores of its tasks; each task is printed and saved when it is finished."""
    config, loaded, is_main = context.config, context.loaded, context.runtime.is_main
    with distributed.raise_on_any_failure():
        if config.bundle is None and context.runtime.local_rank == 0:
            core_bundle.fetch()
    partial = context.folder / f"core_{loaded.step}.partial.jsonl"
    with distributed.raise_on_any_failure():
        bundle = core_bundle.read(config.bundle or core_bundle.default_dir())
        keys = task_keys(context, bundle) if is_main else {}
        saved = read_partial(partial, keys, overwrite=config.overwrite) if is_main else {}
    done = {label: eval.TaskResult(**row) for label, row in distributed.broadcast_object(saved).items()}
    counter = itertools.count(1)
    print(f"\n{'task':<40}{'accuracy':>10}{'centered':>10}")

    def show(label: str, result: TaskResult | str, status: str = "") -> None:
        start = f"{next(counter):>2}/{len(bundle.entries)} {label:<34}"
        if isinstance(result, str):
            print(f"{start} failed: {result}", flush=True)
            return
        status = status or format_duration(result.seconds)
        print(f"{start}{result.accuracy:>10.2%}{result.centered:>10.4f}    {result.rows} rows, {status}", flush=True)

    def show_and_save(label: str, result: TaskResult | str) -> None:
        show(label, result)
        if is_main and not isinstance(result, str):
            row = {name: value for name, value in vars(result).items() if name != "answers"}
            jsonl.append(partial, {"key": keys[label]} | row)

    for label, result in done.items():
        show(label, result, "done before")
    results = eval.core.evaluate(
        loaded.params, loaded.config, loaded.tokenizer, bundle,
        max_per_task=config.max_per_task, max_tokens=config.max_tokens, tokens_per_batch=config.tokens_per_batch,
        compute=model.Compute(context.runtime.compute_dtype), done=done, on_task=show_and_save,
    )  # fmt: skip
    path = context.folder / f"core_{loaded.step}.csv"
    with distributed.raise_on_any_failure():
        if is_main:
            jsonl.write_atomic(path, eval.core.to_csv(results))
    print("\n".join(summary(config, results, path)))
    return as_metrics(results), {f"core/{label}": reason for label, reason in results.failed.items()}


def summary(config: Config, results: Results, path: Path) -> Sequence[str]:
    """Return the lines below the tasks."""
    lines = [] if results.core is None else [f"   {'CORE':<47}{results.core:>10.4f}"]
    limits = [] if config.max_per_task is None else [f"at most {config.max_per_task} rows a task"]
    count = len(results.tasks) + len(results.failed)
    limits += [] if count == core_bundle.NUM_TASKS else [f"{count} of the {core_bundle.NUM_TASKS} published tasks"]
    if limits and results.core is not None:
        lines.append(f"   of {' and '.join(limits)}: not comparable with published numbers")
    return [*lines, f"written: {path}"]


def as_metrics(results: Results) -> dict[str, float]:
    """Return the scores under the names of evaluations.jsonl."""
    values = {} if results.core is None else {"core/CORE": results.core}
    for label, task in results.tasks.items():
        values |= {f"core/{label}": task.centered, f"core/{label}/accuracy": task.accuracy}
    return values


def task_keys(context: Context, bundle: Bundle) -> dict[str, str]:
    """Return label -> a hash of everything that decides a task's result, for the tasks that can be read."""
    state = context.info.state
    leaves = {name: leaf["fingerprint"] for name, leaf in state.items() if name.startswith("params.")}
    fingerprint = context.loaded.tokenizer.fingerprint
    model_key = [leaves, fingerprint, str(context.runtime.compute_dtype), context.config.max_tokens]
    keys = {}
    for label in bundle.entries:
        with contextlib.suppress(UserError):  # reported when the task is evaluated
            task = core_bundle.load(bundle, label, context.config.max_per_task)
            keys[label] = hashlib.sha256(json.dumps([model_key, core_bundle.task_hash(task)]).encode()).hexdigest()
    return keys


def read_partial(path: Path, keys: Mapping[str, str], *, overwrite: bool) -> dict[str, dict[str, Any]]:
    """Return the results of an earlier process for these very tasks: label -> fields of a `TaskResult`."""
    if overwrite:
        path.unlink(missing_ok=True)
    rows = [row for _, row in jsonl.read(path, missing_ok=True, drop_partial=True)]
    return {
        row["label"]: {name: value for name, value in row.items() if name != "key"}
        for row in rows
        if row["key"] == keys.get(row["label"])
    }
