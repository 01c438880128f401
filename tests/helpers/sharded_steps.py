"""What the ranks of test_sharding.py run: training steps in a mode of sharding, against a single process."""

import collections
import contextlib
import dataclasses
import functools
from typing import Any

import small_model
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import distributed, model, optim, train, tree
from nanochat.distributed import Runtime, ShardingConfig, ShardingPlan, sharding
from nanochat.model import Compute, ModelConfig, dense, fp8_emulated, loss

CONFIG = ModelConfig(sequence_len=32, vocab_size=250, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)
STEPS, MICRO_BATCHES, ROWS = 6, 2, 8
MODES = {
    "replicate": ShardingConfig("replicate"),
    "zero2": ShardingConfig("zero2"),
    "fsdp": ShardingConfig("fsdp"),
    "fsdp, gathered once a step": ShardingConfig("fsdp", gather="step"),
    "hsdp": ShardingConfig("hsdp", shard_ranks=2),
    "hsdp, gathered once a step": ShardingConfig("hsdp", shard_ranks=2, gather="step"),
}
Row = dict[str, Any]


class Counter(TorchDispatchMode):
    """Counts the collectives that are called within, and records their order, with Muon's products."""

    def __enter__(self) -> Any:
        self.counts, self.order, self.sent = collections.Counter(), [], collections.defaultdict(list)  # bytes
        return super().__enter__()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().split("::")[1].split(".")[0].removesuffix("_")  # in place or not
        if op.namespace == "_c10d_functional" or name == "baddbmm":
            self.order.append(name)
        if op.namespace == "_c10d_functional" and name != "wait_tensor":
            self.counts[name] += 1
            if isinstance(args[0], Tensor):
                self.sent[name].append(args[0].nbytes)
        return op(*args, **(kwargs or {}))


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (STEPS, MICRO_BATCHES, ROWS, CONFIG.sequence_len + 1), generator=generator)


def batch(rows: Tensor) -> dict[str, Tensor]:
    return {"inputs": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


def hparams(step: int) -> optim.Hparams:
    groups = optim.param_group_settings(optim.OptimConfig(), CONFIG.n_embd)
    for group in groups.values():
        group["lr"] *= (step + 1) / 100  # a warm-up
    return optim.as_hparams(groups)


def start(
    plan: ShardingPlan | None,
    *,
    compile: Any = None,
    grad: str = "autograd",
    linear: Any = dense,
    config: ModelConfig = CONFIG,
) -> tuple[Any, Any]:
    # Zeros would make gradients of nothing but rounding, and Muon makes any gradient as large as the others.
    flat, dtype = tree.flatten(small_model.random_params(config)), torch.float32
    params = tree.unflatten({name: sharding.place(plan, name, x) for name, x in flat.items()})
    compute = Compute(dtype, linear=linear, all_gather=sharding.gather_layer(plan, dtype))
    loss_fn = functools.partial(loss.next_token, config=config, compute=compute, chunk_tokens=64)
    step_fn = functools.partial(
        train.train_step,
        value_and_grad=train.gradient(loss_fn, grad=grad, compile=compile),
        update=train.make_update(donate=True, sharding_plan=plan),
        gather=functools.partial(sharding.gather, plan, dtype=dtype),
    )
    return train.init(params, model.spec(config), dtype, plan), step_fn


def full(params: TensorDict) -> dict[str, Tensor]:
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in tree.flatten(params).items()}


def run_steps(runtime: Runtime, plan: ShardingPlan | None, steps: int) -> Row:
    """Run the steps; alone, with the micro-batches of all ranks, so that sums are taken over the same terms."""
    state, step_fn = start(plan)
    state_bytes = tree.nbytes(sharding.local_shards((state.params, state.opt_state)))
    losses, norms, counter = [], [], None
    for step, micro_batches in enumerate(data()[:steps]):
        ranks = [runtime.rank] if plan else range(runtime.world_size)
        batches = [batch(rows[r :: runtime.world_size]) for rows in micro_batches for r in ranks]
        counter = Counter() if step == steps - 1 else contextlib.nullcontext()  # it costs as much as a step
        with counter:
            state, metrics = step_fn(state, batches, hparams(step))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return {
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
        "counts": dict(getattr(counter, "counts", {})),
        "order": getattr(counter, "order", []),
        "state_bytes": state_bytes,
        "params": full(state.params),
        "moments": full(state.opt_state),
        "cut": len(plan.sharded) if plan else 0,
    }


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the largest |got - want| / |want| of a leaf. (Muon makes single elements of noise as large as any.)"""
    assert list(got) == list(want)
    return max(float((got[n].float() - x.float()).norm() / x.float().norm().clamp_min(1e-3)) for n, x in want.items())


def modes(runtime: Runtime, steps: int = STEPS) -> list[Row]:
    alone, rows = run_steps(runtime, None, steps) if runtime.is_main else None, []
    for name, config in MODES.items():
        if runtime.world_size < 4 and name.startswith("hsdp"):
            continue
        got = run_steps(runtime, sharding.make_plan(config, runtime, model.spec(CONFIG)), steps)
        last = float(got["losses"][-1])
        agree = distributed.all_reduce_sum([last])[0] == runtime.world_size * last
        if alone is None:
            continue
        row = {key: float(((got[key] - alone[key]) / alone[key]).abs().max()) for key in ("losses", "norms")}
        row |= {key: difference(got[key], alone[key]) for key in ("params", "moments")}
        share = got["state_bytes"] / alone["state_bytes"]
        rows.append(
            row | {"mode": name, "agree": agree, "share": share, **{n: got[n] for n in ("counts", "order", "cut")}}
        )
    return rows


def few_steps(runtime: Runtime) -> list[Row]:
    return modes(runtime, steps=3)


def nonfinite(runtime: Runtime) -> list[Row]:
    """One rank's gradient is not finite: no rank takes the step."""
    results = []
    for name in ("replicate", "zero2", "fsdp"):
        state, step_fn = start(sharding.make_plan(MODES[name], runtime, model.spec(CONFIG)))
        before = {n: x.clone() for n, x in full(state.params).items()}
        rows = batch(data()[0, 0][runtime.rank :: runtime.world_size])

        def bad(*args: Any, value_and_grad: Any = step_fn.keywords["value_and_grad"]) -> Any:
            grads, aux = value_and_grad(*args)
            if runtime.rank == 1:
                grads["layers", "0", "mlp", "fc"][0, 0] = torch.nan
            return grads, aux

        state, metrics = step_fn(state, [rows], hparams(0), value_and_grad=bad)
        same = difference(full(state.params), before) == 0
        results.append({"mode": name, "finite": bool(metrics["finite"]), "same": same})
    return results


def compiled(runtime: Runtime) -> Row:
    """A step with compiled gradients where every layer is gathered, against the same step uncompiled.

    Its graphs are run by torch's kernels, as in test_overlap.py, where Inductor's passes reorder them first.
    """
    config, results = dataclasses.replace(CONFIG, n_layer=2), []
    plan = sharding.make_plan(MODES["fsdp"], runtime, model.spec(config))
    rows = batch(data()[0, 0][runtime.rank :: runtime.world_size])
    for compile in (functools.partial(torch.compile, fullgraph=True, backend="aot_eager"), None):
        state, step_fn = start(plan, compile=compile, config=config)
        state, metrics = step_fn(state, [rows], hparams(0))
        results.append((float(metrics["loss"]), full(state.params)))
    (loss, got), (wanted_loss, wanted) = results
    return {"loss": abs(loss / wanted_loss - 1), "params": difference(got, wanted)}


def torch_func(runtime: Runtime) -> Row:
    """The largest difference of 8 losses between torch.func and autograd, with the chunked loss."""
    small = dataclasses.replace(CONFIG, n_layer=2)
    wide = dataclasses.replace(small, n_embd=128)  # as fp8 needs it
    cases = [
        ("zero2", fp8_emulated, wide),
        ("zero2", dense, small),
        ("fsdp, gathered once a step", dense, small),
    ]
    results = {}
    for mode, linear, config in cases:
        plan, losses = sharding.make_plan(MODES[mode], runtime, model.spec(config)), []
        for grad in ("autograd", "torch_func"):
            state, step_fn = start(plan, grad=grad, linear=linear, config=config)
            for step in range(8):
                micro_batches = [batch(x[runtime.rank :: runtime.world_size]) for x in data()[step % STEPS]]
                state, metrics = step_fn(state, micro_batches, hparams(step))
                losses.append(float(metrics["loss"]))
        results[f"{mode}, {linear.__name__}"] = max(abs(a - b) for a, b in zip(losses, losses[8:]))
    return results


def derivatives(runtime: Runtime) -> Row:
    """Σ_ranks <gradient, direction> against the finite difference of Σ_ranks loss, through gathers, in float64."""
    plan = sharding.make_plan(MODES["fsdp"], runtime, model.spec(CONFIG))
    gather = sharding.gather_layer(plan, torch.float64)
    assert plan and gather
    plan.dims["layers.0.attn.proj"] = 1  # pyright: ignore[reportIndexIssue] (columns are sharded as well)
    shapes = {"lm_head": (64, 64), "layers.0.attn.proj": (64, 32)}
    generator = torch.Generator().manual_seed(runtime.rank)
    shards, ways = (
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()} for _ in range(2)
    )

    def f(shards: dict[str, Tensor]) -> Tensor:
        a, b = gather(shards).values()
        return torch.tanh(a @ b * (runtime.rank + 1) / 64).square().sum()

    leaves = {n: x.clone().requires_grad_() for n, x in shards.items()}
    compiled: Any = torch.compile(f, fullgraph=True, backend="aot_eager")
    slopes = []
    for function in (f, compiled):
        grads = torch.autograd.grad(function(leaves), list(leaves.values()))
        slopes.append(sum(float((g * w).sum()) for g, w in zip(grads, ways.values())))
    step = 1e-6
    ends = [f({n: x + sign * step * ways[n] for n, x in shards.items()}) for sign in (1, -1)]
    sums = distributed.all_reduce_sum([*slopes, float(ends[0] - ends[1]) / (2 * step)])
    return dict(zip(("eager", "compiled", "difference"), sums))


def run(*names: str) -> dict[str, Any]:
    """Return the results of each case, by its name."""
    cases = {case.__name__: case for case in (modes, few_steps, nonfinite, compiled, torch_func, derivatives)}
    with distributed.distributed_context("cpu") as runtime:
        return {name: cases[name](runtime) for name in names}
