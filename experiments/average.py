"""Average the parameters of several runs, or of the last checkpoints of one, into a new run: a model soup.

    python launch.py --experiment=average --set runs=d12_a,d12_b,d12_c
    python launch.py --experiment=average --set runs=d12 --set last=5                # the last five checkpoints of d12
    python launch.py --experiment=average --set runs=d12_a,d12_b@2000 --set method=greedy
    python launch.py --experiment=average --set runs=d12 --set method=ema            # the average that train.ema keeps

Models that were trained from the same start lie in one basin, where their mean is often better than each of them.
uniform: the mean of all. greedy: starts with the best, and adds those, the best first, with which the mean has fewer
bits per byte. ema: the exponential average over its steps that a single run has kept. All are measured on the
validation split of the first run's data, and so are the ingredients.

Writes runs/<name>, which chats, is evaluated and fine-tuned like any other. Takes as long as an evaluation of each
ingredient, and memory for three models.

Source: Model soups (arXiv 2203.05482).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from experiments import convert, eval_base
from nanochat import checkpoint, data, distributed, eval, model, train
from nanochat.config import Device, Dtype, PositiveInt, Settings, UserError
from nanochat.text import format_count, format_duration, table

if TYPE_CHECKING:
    from tensordict import TensorDict

    from nanochat.checkpoint import CheckpointInfo
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to average.

    Attributes:
        runs: names or folders of runs; name@100: its step 100.
        last: of a single run, so many of its last checkpoints.
        method: the mean of all, or of those that make it better, or the average that a run has kept (train.ema).
        name: of the run to write; none: that of the first run with _average, or _ema.
        tokens: of the validation split, to measure on.
        device_batch_size: sequences at a time.
        device, dtype: of the evaluation; auto uses a GPU if there is one.
    """

    runs: tuple[str, ...] = ()
    last: PositiveInt | None = None
    method: Literal["uniform", "greedy", "ema"] = "uniform"
    name: train.RunName | None = None
    tokens: PositiveInt = 2**20
    device_batch_size: PositiveInt = 16
    device: Device = "auto"
    dtype: Dtype = "auto"


config = Config


def run(config: Config, runtime: Runtime) -> None:
    distributed.require_single(runtime, "average")
    infos = ingredients(config)
    first, labels = infos[0], [f"{info.folder.name}@{info.step}" for info in infos]
    tok = checkpoint.load_tokenizer(first)
    shape = checkpoint.infer_config(first)
    for info, label in zip(infos[1:], labels[1:]):
        if checkpoint.infer_config(info) != shape:
            raise UserError(f"{label} has another shape than {labels[0]}: only models of one shape have a mean")
        if checkpoint.load_tokenizer(info).fingerprint != tok.fingerprint:
            raise UserError(f"{label} has another tokenizer than {labels[0]}: their tokens mean different things")
    name = config.name or f"{first.folder.name}_{'ema' if config.method == 'ema' else 'average'}"
    what = "the average in" if config.method == "ema" else f"averaging {len(infos)} checkpoints ({config.method}):"
    count, evaluations = model.count(shape)["total"], 2 * len(infos)
    memory = f"{format_count(3 * 4 * count)}B of memory"
    print(f"{what} {', '.join(labels)}; up to {evaluations} evaluations, {memory}", flush=True)
    measure = make_measure(config, first, shape, tok, runtime)
    start = time.perf_counter()
    scores = [measure(read(infos[0], runtime))]
    seconds = time.perf_counter() - start
    print(f"an evaluation takes {format_duration(seconds)}, all {format_duration(seconds * evaluations)}", flush=True)
    scores += [measure(read(info, runtime)) for info in infos[1:]]
    order = sorted(range(len(infos)), key=scores.__getitem__)
    best = infos[order[0]]
    params, score, used = read(best, runtime), scores[order[0]], [order[0]]
    if config.method == "ema":
        params = read_ema(first, params)
    for index in order[1:]:
        mixed = add(params, read(infos[index], runtime), len(used))
        if config.method == "greedy":
            if (mixed_score := measure(mixed)) >= score:
                continue
            score = mixed_score
        params = mixed
        used.append(index)
    if config.method != "greedy":
        score = measure(params)
    rows = [[label, f"{x:.4f}", "yes" if i in used else "no"] for i, (label, x) in enumerate(zip(labels, scores))]
    print(table([["checkpoint", "val bits per byte", "in the mean"], *rows, [name, f"{score:.4f}", ""]]))
    if len(used) == 1 and config.method == "greedy":
        print(f"no mean is better than {labels[used[0]]} alone: no run is written")
        return
    meta = {"average": [labels[i] for i in sorted(used)], "config": best.meta.get("config", {}), "stage": best.stage}
    meta["parent"] = {"run": best.folder.name, "step": best.step, "stage": best.stage}
    folder = convert.write_run(name, best.step, params.to("cpu"), shape, tok, meta)
    gain = min(scores) - score
    print(f"{abs(gain):.4f} bits per byte {'better' if gain >= 0 else 'worse'} than the best ingredient; {folder}")
    print(f"next: python launch.py --experiment=eval_base --set run={name}")


def ingredients(config: Config) -> list[CheckpointInfo]:
    """Return the checkpoints to average, at least two; for ema the one that has its average."""
    if len(config.runs) == 1 and config.last:
        folder = checkpoint.find_run(config.runs[0])
        infos = [checkpoint.inspect(folder, step) for step in checkpoint.steps(folder / "checkpoints")[-config.last :]]
    elif config.last:
        raise UserError(f"last={config.last} is for one run, and runs names {len(config.runs)}")
    else:
        infos = [checkpoint.inspect(run) for run in config.runs]
    if config.method == "ema":
        if len(infos) != 1:
            raise UserError(f"method=ema is for one checkpoint, and there are {len(infos)}: --set runs=name")
        if not any(name.startswith("ema.") for name in infos[0].state):
            raise UserError(
                f"{infos[0].path} has no average of the weights: train with --set train.ema=0.999, or average several "
                "checkpoints: --set method=uniform"
            )
    elif len(infos) < 2:
        raise UserError(
            f"an average needs two checkpoints, not {len(infos)}: --set runs=a,b, or --set runs=a --set last=5 for a "
            "run that keeps several (--set checkpoint.keep_last=5)"
        )
    return infos


def read(info: CheckpointInfo, runtime: Runtime) -> TensorDict:
    params, _, _ = checkpoint.load_params(info.folder / "checkpoints", step=info.step, device=runtime.device)
    return params


def read_ema(info: CheckpointInfo, params: TensorDict) -> TensorDict:
    """Return the average that a checkpoint has, in the dtypes of its parameters and with their config."""
    from nanochat import tree

    averages, _, _ = checkpoint.load_params(
        info.folder / "checkpoints", step=info.step, device=params["wte"].device, field="ema.params"
    )
    flat = tree.flatten(averages)
    return tree.unflatten({name: flat[name].to(x.dtype) for name, x in tree.flatten(params).items()}, params)


def add(mean: TensorDict, params: TensorDict, count: int) -> TensorDict:
    """Return the mean of `count` models with one more, in float32 and back."""
    from nanochat import tree

    def mix(a, b):
        return ((a.float() * count + b.float()) / (count + 1)).to(a.dtype)

    return tree.map(mix, mean, params)


def make_measure(
    config: Config, info: CheckpointInfo, shape: model.ModelConfig, tok: Tokenizer, runtime: Runtime
) -> Callable[[TensorDict], float]:
    """Return params -> bits per byte on the first tokens of the validation split, the same for all."""
    saved = info.meta.get("config", {})
    rows = config.device_batch_size
    stream = data.loader.batches(
        eval_base.data_config(saved), tok, split="val", rows_per_step=rows, sequence_len=shape.sequence_len,
        seed=saved.get("seed", 42), device=runtime.device,
    )  # fmt: skip
    count = max(config.tokens // (rows * shape.sequence_len), 1)
    batches = [batch for batch, *_ in itertools.islice(stream, count)]
    stream.close()
    compute, chunk = model.Compute(runtime.compute_dtype), 1024 if runtime.device.type == "cpu" else 8192
    loss_fn = functools.partial(model.loss.next_token, config=shape, compute=compute, chunk_tokens=chunk)
    return lambda params: eval.bits_per_byte(params, batches, tok, loss_fn)
