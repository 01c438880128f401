"""Adapters with random values, and what the ranks of test_lora.py run: steps on adapters against a single process."""

import dataclasses
import functools
from typing import Any

import sharded_steps
import small_model
import torch
from sharded_steps import MODES, batch, data, full
from torch import Tensor

from nanochat import distributed, model, optim, train, tree
from nanochat.distributed import ShardingPlan, sharding
from nanochat.model import Compute, ModelConfig, loss

CONFIG = dataclasses.replace(sharded_steps.CONFIG, n_layer=2)
TARGETS = ["layers.*.attn.q", "layers.*.mlp.*", "lm_head"]
HPARAMS = optim.as_hparams(
    {
        "matrix": {"lr": 0.01, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0},
        "unembedding": {"lr": 0.01, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0},
    }
)


def random_adapters(config: ModelConfig, targets: list[str], rank: int = 3, plan: ShardingPlan | None = None) -> Any:
    """Return adapters without a zero among them."""
    adapters = model.lora.init(config, 0, rank, targets)
    generator = torch.Generator().manual_seed(1)
    flat = {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in tree.flatten(adapters).items()}
    return tree.unflatten({n: sharding.place(plan, n, x) for n, x in flat.items()}, adapters)


def steps(plan: ShardingPlan | None, rank: int, world_size: int) -> tuple[list[float], dict[str, Tensor], int]:
    """Return the losses of three steps, and then the full adapters and the bytes of this rank's optimizer state."""
    base, rows = small_model.random_params(CONFIG), model.lora.spec(CONFIG, 4, TARGETS)
    lora, dtype = train.build.Lora(base, rows, {}), torch.float32
    loss_fn = functools.partial(loss.next_token, config=CONFIG, compute=Compute(dtype), chunk_tokens=64)
    step_fn = functools.partial(
        train.train_step,
        value_and_grad=train.gradient(lora.adapted(loss_fn, sharding.gather_layer(plan, dtype))),
        update=train.make_update(donate=True, sharding_plan=plan),
        gather=functools.partial(sharding.gather, plan, dtype=dtype),
    )
    state, losses = train.init(random_adapters(CONFIG, TARGETS, 4, plan), rows, dtype, plan), []
    for micro_batches in data()[:3]:
        state, metrics = step_fn(state, [batch(x[rank::world_size]) for x in micro_batches], HPARAMS)
        losses.append(float(metrics["loss"]))
    return losses, full(state.params), tree.nbytes(sharding.local_shards(state.opt_state))


def modes() -> list[dict[str, Any]]:
    results = []
    with distributed.distributed_context("cpu") as runtime:
        want, params, size = steps(None, 0, 1)
        for name in ("replicate", "zero2", "fsdp", "fsdp, gathered once a step"):
            plan = sharding.make_plan(MODES[name], runtime, model.lora.spec(CONFIG, 4, TARGETS))
            assert plan
            got, after, local = steps(plan, runtime.rank, runtime.world_size)
            row = {"mode": name, "losses": max(abs(a / b - 1) for a, b in zip(got, want))}
            row |= {"params": max(float((after[n] - x).abs().max()) for n, x in params.items())}
            results.append(row | {"sharded": bool(plan.sharded), "half": local < 0.6 * size})
    return results
