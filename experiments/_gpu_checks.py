"""Correctness on a GPU, for bench_gpu: the tests that need one, gradients of the compiled step, the loss in fp8."""

import contextlib
import dataclasses
import functools
import statistics
import subprocess
import sys
from typing import Any

import torch

from experiments._gpu_bench import Bench
from experiments.bench_train import ROOT
from nanochat import model, optim, train, transform, tree
from nanochat.distributed import Runtime
from nanochat.model import Compute, ModelConfig, attention, linear, loss
from nanochat.train import StageConfig


def check(bench: Bench) -> None:
    """Run the tests that need a GPU beside a check of gradients and of fp8."""
    log = bench.folder / "pytest.txt"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rf", bench.config.tests]
    with log.open("w") as file:
        tests = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            gradients(bench)
            fp8_loss(bench)
            with contextlib.suppress(subprocess.TimeoutExpired):
                tests.wait(max(bench.seconds_left() - 20, 1))
            code = tests.poll()
        finally:
            if tests.poll() is None:
                tests.kill()
                tests.wait()
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    words = {0: "passed", 5: "none selected", None: "stopped: no time left"}.get(code, "failed")
    last = lines[-1] if lines else "no output"
    print(f"  pytest -m gpu: {words}: {last} ({log})")
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:10]:
        print(f"    {line[:200]}")
    bench.report(what="pytest", outcome=words, last=last)


def small(bench: Bench, depth: int = 4) -> ModelConfig:
    """Return a model small enough to be computed in float32 beside."""
    config = bench.config
    n_head = max(256 // config.head_dim, 1)
    time = min(config.sequence_len, 512)
    return ModelConfig(time, min(config.vocab_size, 4096), depth, n_head, n_head, n_head * config.head_dim, "SSSL")


def ready(bench: Bench, shape: ModelConfig, rows: int, kind: Any) -> Any:
    """Return the train step of a small model with linear layers of a kind."""
    how = dataclasses.replace(bench.config.train, linear=kind)
    settings = StageConfig(compile=bench.config.compile, train=how, device_batch_size=rows)
    return train.build_step_functions(settings, shape, bench.here)[0]


def filled(shape: ModelConfig, here: Runtime, dtype: torch.dtype) -> Any:
    """Return parameters without zeros, which would hide half of the gradients; the same in every dtype."""
    generator = torch.Generator().manual_seed(1)
    flat = {}
    for name, x in tree.flatten(model.init(shape, 0)).items():
        stored = model.storage_dtype(model.spec(shape)[name], dtype)
        flat[name] = (x + 0.02 * torch.randn(x.shape, generator=generator)).to(here.device, stored)
    return model.with_config(tree.unflatten(flat), shape)


def batch_of(shape: ModelConfig, rows: int, here: Runtime, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return rows that can be learnt: each counts on from a random id by a random step of 1 to 4."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(shape.vocab_size, (rows, 1), generator=generator)
    step = torch.randint(1, 5, (rows, 1), generator=generator)
    ids = ((start + step * torch.arange(shape.sequence_len + 1)) % shape.vocab_size).to(here.device)
    return {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def gradients(bench: Bench) -> None:
    """Compare gradients of the step's own loss with those of plain operations in float32."""
    shape, rows, here = small(bench), 2, bench.here
    one, batch = torch.ones((), device=here.device), batch_of(shape, rows, here)
    plain = functools.partial(loss.next_token, config=shape, compute=Compute(torch.float32, attend=attention.math))
    grads, (wanted, _) = transform.value_and_grad(plain, has_aux=True)(filled(shape, here, torch.float32), batch)
    want = {name: g.double() for name, g in tree.flatten(grads).items()}
    total = sum(float(g.square().sum()) for g in want.values()) ** 0.5
    for kind, predicted in {"dense": 0.02, "fp8": 0.1}.items():
        if kind not in bench.config.linears:
            continue
        value_and_grad = ready(bench, shape, rows, kind).keywords["value_and_grad"]
        grads, (value, _) = value_and_grad(filled(shape, here, here.compute_dtype), batch, one)
        got = {name: g.double() for name, g in tree.flatten(grads).items()}
        errors = {name: float((got[name] - g).norm() / g.norm().clamp_min(1e-30)) for name, g in want.items()}
        whole = sum(float((got[name] - g).square().sum()) for name, g in want.items()) ** 0.5 / total
        worst = max(errors, key=lambda name: errors[name])
        verdict = "as predicted" if whole <= predicted else "MORE THAN PREDICTED"
        print(
            f"  gradients, {kind} in {here.compute_dtype}, compile={bench.config.compile}, against plain float32: "
            f"off by {whole:.2%} of the norm (predicted under {predicted:.0%}: {verdict}); worst {worst} "
            f"{errors[worst]:.1%}; loss {float(value):.4f} / {float(wanted):.4f}"
        )
        bench.report(what=f"gradients {kind}", error=whole, predicted=predicted, worst=worst, loss=float(value))


def fp8_loss(bench: Bench, steps: int = 40) -> None:
    """Train a small model with dense linear layers and with fp8 ones, and compare the losses at the end."""
    if "fp8" not in bench.config.linears:
        return
    shape, rows, here = small(bench), 16 if bench.cuda else 2, bench.here
    losses = {}
    for kind in ("dense", "fp8"):
        step = ready(bench, shape, rows, kind)
        params = model.init(shape, 0, device=here.device, dtype=here.compute_dtype)
        state = train.init(params, model.spec(shape), here.compute_dtype)
        hparams = optim.as_hparams(optim.param_group_settings(optim.OptimConfig(), shape.n_embd))
        found = []
        for i in range(steps if bench.cuda else 4):
            state, metrics = step(state, [batch_of(shape, rows, here, i)], hparams)
            found.append(metrics["loss"])
        losses[kind] = statistics.mean(float(x) for x in found[-5:])
    change = losses["fp8"] / losses["dense"] - 1
    verdict = "as predicted" if abs(change) <= 0.02 else "MORE THAN PREDICTED"
    print(
        f"  loss of a short run: dense {losses['dense']:.4f}, fp8 {losses['fp8']:.4f}: {change:+.2%} (predicted within "
        f"2%: {verdict}); linear layers in {linear.choose('fp8', here.device)[1]}"
    )
    bench.report(what="fp8 loss", dense=losses["dense"], fp8=losses["fp8"], change=change, predicted=0.02)
