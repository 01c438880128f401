"""N models in one step beside N single steps: time, and how far the losses differ (what=members of bench_train)."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from typing import TYPE_CHECKING, Any

import torch

from experiments import _bench
from nanochat import distributed, model, optim, train, tree
from nanochat.distributed import Runtime
from nanochat.model import Compute, ModelConfig, attention
from nanochat.train import functional

if TYPE_CHECKING:
    from experiments.bench_train import Config

LRS = (0.005, 0.01, 0.02, 0.04)  # of the matrices; a member's seed changes after each round of these


def measure(config: Config, shape: ModelConfig, runtime: Runtime) -> None:
    """Train `config.members` models in one step and one after the other, in turns, on the same random tokens."""
    n, rows = config.members, config.batch_size or 1
    lrs = [LRS[i % len(LRS)] for i in range(n)]
    compile = distributed.compile_fn if config.compile else None
    attend = attention.sdpa
    print(f"{n} members of depth {shape.n_layer}, width {shape.n_embd}, {model.count(shape)['total']:,} parameters")
    print(f"a step of each: {rows} x {shape.sequence_len} tokens; {_bench.describe_machine(runtime)}", flush=True)

    def start(member: int) -> train.TrainState:
        params = model.init(shape, member // len(LRS), device=runtime.device, dtype=runtime.compute_dtype)
        return train.init(params, model.spec(shape), runtime.compute_dtype)

    def loss_fn(attend: attention.Attend) -> Any:
        compute = Compute(dtype=runtime.compute_dtype, attend=attend)
        return functools.partial(model.loss.next_token, config=shape, compute=compute, chunk_tokens=8192)

    update = train.make_update(compute_dtype=runtime.compute_dtype, compile=config.compile, donate=True)
    value_and_grad = train.gradient(loss_fn(attend), compile=compile)
    single = functools.partial(train.train_step, value_and_grad=value_and_grad, update=update)
    auto = functional.choose_chunk_size(shape, rows * shape.sequence_len, n, runtime.device)
    sizes = config.chunk_sizes or (auto,)
    options: Any = {"shared_batch": True, "compute_dtype": runtime.compute_dtype, "compile": compile}
    together = {
        size: functional.make_members_step(
            loss_fn(attend if size == 1 else functional.fold_members(attend)), chunk_size=size, **options
        )
        for size in sizes
    }
    alone = [start(i) for i in range(n)]
    stacked = {size: functional.init_members(start, n) for size in sizes}
    generator = torch.Generator().manual_seed(0)
    seconds: dict[int, list[float]] = {0: [], **{size: [] for size in sizes}}  # 0: single steps
    differences: dict[int, list[float]] = {size: [] for size in sizes}
    losses = torch.zeros(n)
    for step in range(config.rounds * config.steps_per_round):
        ids = torch.randint(shape.vocab_size, (rows, shape.sequence_len + 1), generator=generator).to(runtime.device)
        batch = {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
        hparams = [hparams_of(lr, shape, rows, step) for lr in lrs]

        def all_single(batch: Any = batch, hparams: Any = hparams) -> None:
            for i, state in enumerate(alone):
                alone[i], metrics = single(state, [batch], hparams[i])
                losses[i] = metrics["loss"]

        seconds[0].append(_bench.timed(all_single, runtime))
        for size in sizes:
            metrics: dict[str, Any] = {}

            def one_step(size: int = size, batch: Any = batch, hparams: Any = hparams, metrics: Any = metrics) -> None:
                stacked_hparams = functional.stack_hparams(hparams, runtime.device)
                metrics |= together[size](stacked[size], [batch], stacked_hparams)[1]

            seconds[size].append(_bench.timed(one_step, runtime))
            differences[size].append(float((metrics["loss"].cpu() - losses).abs().max()))
    later = {size: statistics.median(times[len(times) // 4 :]) for size, times in seconds.items()}
    print(f"{len(seconds[0])} steps: {n} single ones take {later[0] * 1e3:.1f} ms")
    for size in sizes:
        ratio, worst = later[size] / later[0], max(differences[size])
        print(f"one of {n} members, {size} at once{' (auto)' * (size == auto)}: {later[size] * 1e3:.1f} ms, ", end="")
        print(
            f"ratio {ratio:.2f}; compiled in {seconds[size][0]:.0f} s; largest difference of a loss {worst:.1e}, ",
            end="",
        )
        pairs = zip(tree.leaves(stacked[size].params), zip(*(tree.leaves(state.params) for state in alone)))
        distances = [float((a - torch.stack(b)).norm() / torch.stack(b).norm().clamp_min(1e-6)) for a, b in pairs]
        print(f"of a leaf of the parameters {max(distances):.1e}")
        result = {"chunk_size": size, "ratio": ratio, "loss_error": worst, "params_error": max(distances)}
        result["step_seconds"] = later[size]
        print(json.dumps({"bench": "members", **dataclasses.asdict(config), **result}), flush=True)


def hparams_of(matrix_lr: float, shape: ModelConfig, rows: int, step: int) -> optim.Hparams:
    """Return the hyperparameters that pretraining would use with this batch, during its warm-up."""
    config = optim.OptimConfig(matrix_lr=matrix_lr)
    scale = optim.scaling.batch_scale(rows * shape.sequence_len)
    plan = optim.Plan(shape.n_embd, 1, rows * shape.sequence_len, 1000, scale, config.weight_decay, 1)
    return optim.hparams(config, plan, step)
