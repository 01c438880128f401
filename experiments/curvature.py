"""Measure the curvature of a run's loss: Hessian eigenvalues and trace, and the sharpness that its optimizer sees.

    python launch.py --experiment=curvature --set run=quickstart                   # at all of its checkpoints
    python launch.py --experiment=curvature --set run=d12 --set steps=1000,2000 --set tokens=65536

For choosing learning rates and warm-up, and for seeing why a run became unstable. In float32, on the tokens that the
run would train on next after each checkpoint:

- the largest eigenvalues of the Hessian H, each with a bound of its error, the most negative one, and the trace;
- for pretraining, the preconditioned sharpness, the largest eigenvalue of P^(-1)·H, where P^(-1) is what the optimizer
  multiplies its momentum by: lr / (sqrt(v) + eps) in AdamW (Cohen et al. 2022, arXiv 2207.14484), in Muon, which
  orthogonalizes its momentum M, lr·(M·M^T)^(-1/2). On a quadratic, steps diverge where it is above 2 without momentum,
  above 18 with one of 0.8. Few tokens have more curvature than all, and more where their rows of embeddings are rare;
- the loss along the first eigenvector and, for pretraining, along the next update.

Writes curvature.jsonl and charts (SVG) to curvature/ in the run's folder. Takes about two and a half minutes for a
checkpoint of the quickstart on one CPU core, and memory for `iterations` copies of the model.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from experiments import _replay, pretrain
from nanochat import checkpoint, distributed, jsonl, metrics, model, optim, train
from nanochat.config import Device, NonNegativeInt, PositiveInt, Settings, UserError
from nanochat.text import format_count, format_duration

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat.checkpoint import CheckpointInfo
    from nanochat.distributed import Runtime

TOLERANCE = 1e-2  # of the eigenvalues, as a share of the largest: fewer products will do then
POINTS = 21  # of each curve of the loss


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to measure.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. name@100: its step 100.
        steps: of the checkpoints to measure at; none: all.
        eigenvalues: how many of the largest.
        iterations: most Hessian products for them (Lanczos); each keeps a vector of the model's size in memory.
        samples: random Hessian products for the trace (Hutchinson); its error falls with their square root.
        tokens: whose mean loss is measured.
        device_batch_size: sequences at a time.
        device: where to compute; auto: CUDA, else MPS, else the CPU.
    """

    run: str | None = None
    steps: tuple[NonNegativeInt, ...] = ()
    eigenvalues: PositiveInt = 5
    iterations: PositiveInt = 40
    samples: Annotated[int, "at least 2", lambda x: x >= 2] = 10
    tokens: PositiveInt = 2048
    device_batch_size: PositiveInt = 4
    device: Device = "auto"


config = Config


class Loss(NamedTuple):
    """A loss as functions of a flat vector of parameters."""

    value: Callable[[Tensor], float]
    gradient: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]  # (parameters, v) -> H·v


def run(config: Config, runtime: Runtime) -> None:
    import torch

    distributed.require_single(runtime, "curvature")
    runtime = dataclasses.replace(runtime, compute_dtype=torch.float32)
    name, step = checkpoint.split_step(config.run)
    folder = checkpoint.find_run(name)
    steps = config.steps or (checkpoint.steps(folder / "checkpoints") if step is None else [step])
    infos = [checkpoint.inspect(folder, step) for step in steps]  # those that are missing are named first
    products = len(infos) * (2 * config.iterations + config.samples + config.eigenvalues)
    announce(config, infos, runtime, products)
    results = []
    with metrics.progress.Bar(products, label="curvature", unit="product") as bar:
        for number, info in enumerate(infos, start=1):
            results.append(measure(config, info, runtime, bar))
            bar.update(number * products // len(infos) - bar.done)  # Lanczos may need fewer
            bar.write(describe(results[-1]))
    write(results, folder)


def announce(config: Config, infos: list[CheckpointInfo], runtime: Runtime, products: int) -> None:
    """Print what will be done, how long it takes at most and in how much memory; refuse what does not fit."""
    shape = checkpoint.infer_config(infos[0])
    n, length, layers = model.count(shape)["total"], shape.sequence_len, shape.n_layer
    # A product is the forward and backward pass and their derivatives, uncompiled, at a third of the peak.
    flops = products * config.tokens * 10 * model.flops_per_token(shape)
    seconds = flops / distributed.peak_flops(runtime.device, runtime.compute_dtype)[0]
    per_token = layers * (120 * shape.n_embd + 12 * shape.n_head * length) + 20 * shape.padded_vocab
    rows = min(config.device_batch_size, max(config.tokens // length, 1))
    needed = 4 * (n * (config.iterations + config.eigenvalues + 14) + rows * length * per_token) / 2**30
    free = distributed.free_bytes(runtime.device) / 2**30
    what = f"curvature of {infos[0].folder.name} at {len(infos)} checkpoint{'s' * (len(infos) > 1)}"
    memory = f"{needed:.1f} GiB: {format_count(n)} parameters, {config.iterations} vectors of as many"
    if needed > free:
        raise UserError(f"{what} takes {memory}; {free:.1f} GiB are free: set iterations or device_batch_size lower")
    took = format_duration(seconds)
    print(f"{what}: at most {products} Hessian products, {config.tokens:,} tokens each, {took}, {memory}", flush=True)


def measure(config: Config, info: CheckpointInfo, runtime: Runtime, bar: Any) -> dict[str, Any]:
    """Return what is measured at a checkpoint, as JSON."""
    import torch

    from nanochat.train import functional

    began, where = time.monotonic(), f"step {info.step} of {info.folder.name}"
    base = train.init_from.load(info.folder, info.step)
    state = train.init_state_from(base, runtime, None)
    x, unravel = functional.ravel(state.params)
    loss = make_loss(config, info, runtime, unravel)
    value, gradient = loss.value(x), loss.gradient(x)
    if not math.isfinite(value + float(gradient.norm())):
        raise UserError(f"{where}: loss {value}, gradient norm {float(gradient.norm())}: no curvature to measure")

    def product(v: Tensor) -> Tensor:
        bar.update()
        return loss.product(x, v)

    generator = torch.Generator(runtime.device).manual_seed(0)
    start = torch.randn(x.shape, generator=generator, device=x.device)
    lanczos = (config.iterations, TOLERANCE)
    top = functional.lanczos(product, start, config.eigenvalues, *lanczos)
    trace, trace_error = functional.hutchinson(product, x, config.samples, generator, top.vectors)
    largest, first = float(top.values[0]), top.vectors[0]
    size = (2 / max(abs(largest), 1e-12)) ** 0.5  # a quadratic has risen by 1 there
    shift = 0.01 * size * first
    difference = first @ (loss.gradient(x + shift) - loss.gradient(x - shift)) / (0.02 * size)

    def curve(direction: Tensor, first: float, last: float) -> dict[str, list[float]]:
        at = torch.linspace(first, last, POINTS).tolist()
        return {"at": at, "loss": [loss.value(x + distance * direction) for distance in at]}

    result: dict[str, Any] = {"step": info.step, "loss": value, "gradient_norm": float(gradient.norm())}
    result |= {"eigenvalues": top.values.tolist(), "errors": top.errors.tolist(), "smallest": top.smallest}
    result |= {"by_finite_differences": float(difference), "trace": trace, "trace_error": trace_error}
    result["along eigenvector"] = curve(first, -size, size)
    if base.moments and info.stage == "base":
        settings = _replay.restore_config(pretrain.Config(), info.meta["config"])
        _, plan = pretrain.resolve(settings, base.tokenizer)
        hparams = optim.hparams(settings.optim, plan, info.step)
        root = functional.inverse_root(state.opt_state, hparams)

        def scale(v: Tensor) -> Tensor:
            return functional.ravel(root(unravel(v)))[0]

        sharpest = functional.lanczos(lambda v: scale(product(scale(v))), start, 1, *lanczos)
        result |= {"sharpness": float(sharpest.values[0]), "sharpness_error": float(sharpest.errors[0])}
        new, _ = optim.update(unravel(gradient), state.opt_state, state.params, hparams)
        result["along update"] = curve(functional.ravel(new)[0] - x, -1, 3)
    return result | {"tokens": config.tokens, "seconds": time.monotonic() - began}


def make_loss(config: Config, info: CheckpointInfo, runtime: Runtime, unravel: Callable[[Tensor], Any]) -> Loss:
    """Return the mean loss of the first tokens that the run would train on after a checkpoint."""
    import torch

    from nanochat.train import functional

    shape = checkpoint.infer_config(info)
    rows, inputs, targets = max(config.tokens // shape.sequence_len, 1), [], []
    for step in _replay.steps_after(info.folder, info.step, runtime.device):
        inputs.append(step.batch["inputs"])
        targets.append(step.batch["targets"])
        if sum(map(len, inputs)) >= rows:
            break
    if not inputs:
        raise UserError(f"step {info.step} of {info.folder.name}: its data ends here; set steps to earlier ones")
    batch = _replay.with_weights({"inputs": torch.cat(inputs)[:rows], "targets": torch.cat(targets)[:rows]})
    compute = model.Compute(runtime.compute_dtype, attend=model.attention.math)

    def part_loss(part: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: model.loss.next_token(unravel(x), part, config=shape, compute=compute)[0]

    losses = [part_loss(dict(part)) for part in train.split_batch(batch, config.device_batch_size)]  # summed: the mean
    return Loss(
        value=torch.no_grad()(lambda x: sum(float(f(x)) for f in losses)),
        gradient=lambda x: torch.stack([torch.func.grad(f)(x) for f in losses]).sum(0),
        product=lambda x, v: sum((functional.hvp(f, x)(v) for f in losses), torch.zeros_like(x)),
    )


def describe(result: dict[str, Any]) -> str:
    """Return what was measured at a checkpoint, as text."""
    r = result
    values = ", ".join(f"{value:.4g} ± {error:.1g}" for value, error in zip(r["eigenvalues"], r["errors"]))
    lines = [
        f"step {r['step']}: loss {r['loss']:.4f}, norm of the gradient {r['gradient_norm']:.4f}",
        f"  largest eigenvalues {values}; by finite differences, the first is {r['by_finite_differences']:.4g}",
        f"  most negative eigenvalue {r['smallest']:.4g}; trace {r['trace']:.4g} ± {r['trace_error']:.2g}",
    ]
    if "sharpness" in r:
        best, lowest = min(zip(*r["along update"].values()), key=lambda point: point[1])
        lines.append(f"  preconditioned sharpness {r['sharpness']:.4g} ± {r['sharpness_error']:.1g}")
        lines.append(f"  the loss is {lowest:.4f} at {best:.2g} times the next update, the lowest from -1 to 3 times")
    return "\n".join([*lines, f"  took {format_duration(r['seconds'])}"])


def write(results: list[dict[str, Any]], folder: Path) -> None:
    """Write the results and their charts into the run's folder."""
    into, steps = folder / "curvature", [r["step"] for r in results]
    jsonl.append(into / "curvature.jsonl", *results)
    labels = {"along eigenvector": "distance along the first eigenvector", "along update": "times the next update"}
    for key, label in labels.items():
        curves = {f"step {r['step']}": tuple(r[key].values()) for r in results if key in r}
        if curves:
            path, title = into / f"{key.replace(' ', '_')}.svg", f"{folder.name}: loss {key}"
            metrics.plots.line_chart(path, curves, title=title, x_label=label, y_label="nats per token")
    curves = {"largest eigenvalue": (steps, [r["eigenvalues"][0] for r in results])}
    curves["trace"] = steps, [r["trace"] for r in results]
    curves["preconditioned sharpness"] = steps, [r.get("sharpness", math.nan) for r in results]
    title = f"{folder.name}: curvature"
    metrics.plots.line_chart(into / "by_step.svg", curves, title=title, x_label="step", y_label="", log_y=True)
    print(f"written to {into}: curvature.jsonl, {', '.join(sorted(path.name for path in into.glob('*.svg')))}")
