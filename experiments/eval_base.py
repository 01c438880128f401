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
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from nanochat import checkpoint, data, distributed, eval, infer, jsonl, metrics, model, train
from nanochat.config import NonNegativeInt, PositiveInt, UserError
from nanochat.data import DataConfig
from nanochat.eval import core_bundle
from nanochat.text import format_duration, table_row

if TYPE_CHECKING:
    from nanochat.checkpoint import CheckpointInfo, Pretrained
    from nanochat.distributed import Runtime
    from nanochat.eval import Bundle, TaskResult

    Outcome = tuple[dict[str, float], dict[str, str]]  # metrics, and what failed -> the reason

BPB_TOKENS = 40 * 2**19  # for a model whose run does not set eval.tokens


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.LoadConfig):
    """What to evaluate.

    Attributes:
        tasks: any of samples, bpb and core.
        bundle: folder of the CORE eval bundle; none: download the published one.
        bundle_sha256: SHA-256 that the downloaded zip file must have; none: any.
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
    """

    tasks: tuple[Literal["samples", "bpb", "core"], ...] = ("samples", "bpb", "core")
    bundle: Path | None = None
    bundle_sha256: str | None = core_bundle.SHA256
    max_per_task: PositiveInt | None = None
    max_tokens: Annotated[int, "at least 2", lambda x: x >= 2] | None = None
    tokens_per_batch: PositiveInt | None = None
    overwrite: bool = False
    source: str | None = None
    text_column: str | None = None
    tokens: PositiveInt | None = None
    device_batch_size: PositiveInt = 16
    prompts: tuple[str, ...] = train.PROMPTS
    sample_tokens: PositiveInt = 16
    free_samples: NonNegativeInt = 8
    free_tokens: PositiveInt = 128


config = Config


def run(config: Config, runtime: Runtime) -> None:
    with distributed.raise_on_any_failure():
        if config.bundle is not None and "core" in config.tasks:
            core_bundle.read(config.bundle)  # a wrong path fails before anything is evaluated
        loaded = checkpoint.load(config.run, step=config.step, device=runtime.device, dtype=runtime.compute_dtype)
        info = checkpoint.inspect(loaded.folder, loaded.step)
    print(checkpoint.describe_model(loaded))
    train.build.advise_all_gpus(runtime)
    results: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, evaluate in {"samples": write_samples, "bpb": bits_per_byte, "core": core}.items():
        if name not in config.tasks:
            continue
        try:
            values, reasons = evaluate(config, runtime, loaded, info)
            results, failed = results | values, failed | reasons
        except distributed.LostRankError:
            raise
        except UserError as error:
            failed[name] = str(error)
            print(f"{name} failed: {error}", flush=True)
    if results or failed:
        with distributed.raise_on_any_failure():
            if runtime.is_main:
                digest = core_bundle.read_hash(config.bundle or core_bundle.default_dir())
                more = {"core_bundle_sha256": digest} if digest and "core" in config.tasks else {}
                metrics.logger.append_evaluation(loaded.folder, loaded.step, loaded.stage, results, failed, **more)
        print(f"recorded in {loaded.folder / metrics.logger.EVALUATIONS_FILE}")
    if failed:
        mean = ", and so CORE, the mean over all its tasks" if any(name.startswith("core/") for name in failed) else ""
        raise UserError(
            f"{len(failed)} failed: {', '.join(failed)}{mean}; the reasons are above, and the same command retries them"
        )
    name = loaded.name
    print(f"next: python launch.py --experiment=sft --set run={name}, or --experiment=report --set run={name}")


def write_samples(config: Config, runtime: Runtime, loaded: Pretrained, _info: CheckpointInfo) -> Outcome:
    """Print and write completions of the prompts and samples without a prompt; rank 0 generates, the others wait."""
    with distributed.raise_on_any_failure():
        if not runtime.is_main:
            return {}, {}
        tok = loaded.tokenizer
        prompts = [(text, config.sample_tokens, 0.0) for text in config.prompts]
        prompts += [("", config.free_tokens, 1.0)] * config.free_samples
        requests = [
            infer.Request((tok.bos, *tok.encode(text)), max_tokens, temperature, top_k=0, seed=seed)
            for seed, (text, max_tokens, temperature) in enumerate(prompts)
        ]
        slots = max(min(8, len(requests)), 1)
        engine = infer.start(loaded.params, loaded.config, tok, slots=slots, compile=False, exact=True)
        rows = [
            {"prompt": text, "completion": tok.decode(done.content), "temperature": temperature, "seed": seed}
            for seed, ((text, _, temperature), done) in enumerate(zip(prompts, infer.complete(engine, requests)))
        ]
        path = loaded.folder / "eval" / f"samples_{loaded.step}.jsonl"
        jsonl.write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        print("\n".join(f"  {row['prompt']!r} → {row['completion']!r}" for row in rows))
    return {}, {}


def bits_per_byte(config: Config, runtime: Runtime, loaded: Pretrained, info: CheckpointInfo) -> Outcome:
    """Return bits per byte of the first tokens of both splits: the same full rows on any number of ranks."""
    saved = info.meta.get("config", {})
    source = data_config(saved, source=config.source, text_column=config.text_column)
    tokens = config.tokens or saved.get("eval.tokens") or BPB_TOKENS
    compute, chunk_tokens = model.Compute(runtime.compute_dtype), 1024 if runtime.device.type == "cpu" else 8192
    loss = functools.partial(model.loss.next_token, config=loaded.config, compute=compute, chunk_tokens=chunk_tokens)
    results: dict[str, float] = {}
    for split in data.sources.SPLITS:
        with distributed.raise_on_any_failure():
            stream = data.loader.batches(
                source, loaded.tokenizer, split=split, rows_per_step=config.device_batch_size * runtime.world_size,
                sequence_len=loaded.config.sequence_len, seed=saved.get("seed", 42),
                rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
            )  # fmt: skip
            with contextlib.closing(stream):
                total = max(tokens // loaded.config.sequence_len, 1)
                batches = first_rows(stream, total, config.device_batch_size, runtime)
                sums = eval.bpb.sum_nats(loaded.params, batches, loaded.tokenizer, loss)
        results[f"{split}/bpb"] = eval.bpb.over_ranks(*sums)
        print(f"{split}: {results[f'{split}/bpb']:.4f} bits per byte of {source.source}", flush=True)
    return results, {}


def data_config(saved: dict[str, Any], **chosen: str | None) -> DataConfig:
    """Return where a run's documents came from, by its settings, with what is `chosen` instead."""
    names = ("source", "text_column", "buffer_docs")
    values: dict[str, Any] = {name: chosen.get(name) or saved.get(f"data.{name}") for name in names}
    return DataConfig(**{name: value for name, value in values.items() if value is not None})


def first_rows(stream: Iterator[Any], total: int, batch_rows: int, runtime: Runtime) -> Iterator[dict[str, Any]]:
    """Yield this rank's batches of the first `total` rows, with the targets of surplus rows ignored."""
    import torch

    numbers = torch.arange(batch_rows, device=runtime.device) * runtime.world_size + runtime.rank
    for first, (batch, *_) in zip(range(0, total, batch_rows * runtime.world_size), stream):
        surplus = (first + numbers >= total)[:, None]
        yield {"inputs": batch["inputs"], "targets": batch["targets"].masked_fill(surplus, model.IGNORE)}


def core(config: Config, runtime: Runtime, loaded: Pretrained, info: CheckpointInfo) -> Outcome:
    """Return CORE and the scores of its tasks; each task is printed and saved when it is finished."""
    folder, is_main = loaded.folder / "eval", runtime.is_main
    partial = folder / f"core_{loaded.step}.partial.jsonl"
    with distributed.raise_on_any_failure():
        if config.bundle is None and runtime.local_rank == 0:
            core_bundle.fetch(sha256=config.bundle_sha256)
    with distributed.raise_on_any_failure():
        bundle = core_bundle.read(config.bundle or core_bundle.default_dir())
        keys = task_keys(config, runtime, loaded, info, bundle) if is_main else {}
        if config.overwrite and is_main:
            partial.unlink(missing_ok=True)
    finished = eval.results.read_finished(partial, keys)
    done = {label: eval.TaskResult(**result) for label, result in finished.items()}
    counter = itertools.count(1)
    print("\n" + table_row(["task", "accuracy", "centered"], eval.results.WIDTHS))

    def show(label: str, result: TaskResult | str) -> None:
        name = f"{next(counter):>2}/{len(bundle.entries)} {label}"
        if isinstance(result, str):
            print(f"  {name} failed: {result}", flush=True)
            return
        shortened = f"{result.shortened} of them shortened to max_tokens, " if result.shortened else ""
        status = f"{result.rows} rows, {shortened}{'done before' if label in done else format_duration(result.seconds)}"
        print(eval.results.line(name, result.accuracy, result.centered, status), flush=True)
        if is_main and label not in done:
            row = {name: value for name, value in vars(result).items() if name != "answers"}
            jsonl.append(partial, {"key": keys[label], **row})

    for label, result in done.items():
        show(label, result)
    results = eval.core.evaluate(
        loaded.params, loaded.config, loaded.tokenizer, bundle,
        max_per_task=config.max_per_task, max_tokens=config.max_tokens, tokens_per_batch=config.tokens_per_batch,
        compute=model.Compute(runtime.compute_dtype), done=done, on_task=show,
    )  # fmt: skip
    path = folder / f"core_{loaded.step}.csv"
    with distributed.raise_on_any_failure():
        if is_main:
            jsonl.write_atomic(path, eval.core.to_csv(results))
    if results.core is not None:
        print(table_row(["CORE", "", f"{results.core:.4f}"], eval.results.WIDTHS))
        limits = [] if config.max_per_task is None else [f"at most {config.max_per_task} rows a task"]
        if len(results.tasks) != core_bundle.NUM_TASKS:
            limits.append(f"{len(results.tasks)} of the {core_bundle.NUM_TASKS} published tasks")
        if limits:
            print(f"  of {' and '.join(limits)}: not comparable with published numbers")
    print(f"written: {path}")
    values = {} if results.core is None else {"core/CORE": results.core}
    for label, task in results.tasks.items():
        values |= {f"core/{label}": task.centered, f"core/{label}/accuracy": task.accuracy}
    return values, {f"core/{label}": reason for label, reason in results.failed.items()}


def task_keys(
    config: Config, runtime: Runtime, loaded: Pretrained, info: CheckpointInfo, bundle: Bundle
) -> dict[str, str]:
    """Return label -> a hash of everything that decides a task's result, for the tasks that can be read."""
    model_key = eval.results.model_key(info, loaded.tokenizer, runtime.compute_dtype)
    keys = {}
    for label in bundle.entries:
        with contextlib.suppress(UserError):  # reported when the task is evaluated
            task = core_bundle.load(bundle, label, config.max_per_task)
            keys[label] = eval.results.key([*model_key, config.max_tokens], core_bundle.task_hash(task))
    return keys
