"""What the ranks of test_sharding.py run: training steps in a mode of sharding, against a single process."""

import collections
import contextlib
import functools
from typing import Any

import small_model
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import distributed, model, optim, train, tree
from nanochat.distributed import ShardingConfig, ShardingPlan, compile_fn, sharding
from nanochat.model import Compute, ModelConfig, loss

CONFIG = ModelConfig(sequence_len=32, vocab_size=250, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)
STEPS, MICRO_BATCHES, ROWS = 10, 2, 8
MODES = {
    "replicate": ShardingConfig("replicate"),
    "zero2": ShardingConfig("zero2"),
    "fsdp": ShardingConfig("fsdp"),
    "fsdp, gathered once a step": ShardingConfig("fsdp", gather="step"),
    "hsdp": ShardingConfig("hsdp", shard_ranks=2),
    "hsdp, gathered once a step": ShardingConfig("hsdp", shard_ranks=2, gather="step"),
}


class Counter(TorchDispatchMode):
    """Counts the collectives that are called within."""

    def __enter__(self) -> Any:
        self.counts = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "_c10d_functional" and "wait" not in op.name():
            self.counts[op.name().split("::")[1].split(".")[0].removesuffix("_")] += 1  # in place or not
        return op(*args, **(kwargs or {}))


RESULTS: dict[str, list[dict[str, Any]]] = {}


def say(case: str, found: dict[str, Any]) -> None:
    RESULTS.setdefault(case, []).append(found)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (STEPS, MICRO_BATCHES, ROWS, CONFIG.sequence_len + 1), generator=generator)


def batch(rows: Tensor) -> dict[str, Tensor]:
    return {"inputs": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


def hparams(step: int) -> optim.Hparams:
    rates = optim.param_group_settings(optim.OptimConfig(), CONFIG.n_embd)
    for group in rates.values():
        group["lr"] *= (step + 1) / 100  # a warm-up
    return optim.as_hparams(rates)


def start(
    sharding_plan: ShardingPlan | None, *, compile: bool = False, donate: bool = True
) -> tuple[train.TrainState, Any]:
    dtype = torch.float32
    # Zeros would make gradients of nothing but rounding, and Muon makes any gradient as large as the others.
    flat = tree.flatten(small_model.random_params(CONFIG))
    params = tree.unflatten({name: sharding.place(sharding_plan, name, x) for name, x in flat.items()})
    state = train.init(params, model.spec(CONFIG), dtype, sharding_plan)
    compute = Compute(dtype, all_gather=sharding.gather_layer(sharding_plan, dtype))
    loss_fn = functools.partial(loss.next_token, config=CONFIG, compute=compute, chunk_tokens=64)
    step_fn = functools.partial(
        train.train_step,
        value_and_grad=train.gradient(loss_fn, compile=compile_fn if compile else None),
        update=train.make_update(donate=donate, compile=compile, sharding_plan=sharding_plan),
        gather=functools.partial(sharding.gather, sharding_plan, dtype=dtype),
    )
    return state, step_fn


def whole(params: TensorDict) -> dict[str, Tensor]:
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in tree.flatten(params).items()}


def steps(here: distributed.Runtime, sharding_plan: ShardingPlan | None, **how: bool) -> dict[str, Any]:
    """Run the steps; alone, with the micro-batches of all ranks, so that sums are taken over the same terms."""
    state, step_fn = start(sharding_plan, **how)
    state_bytes = tree.nbytes(sharding.local_shards((state.params, state.opt_state)))
    losses, norms, counts = [], [], {}
    for step, micro_batches in enumerate(data()):
        ranks = [here.rank] if sharding_plan else range(here.world_size)
        mine = [batch(rows[r :: here.world_size]) for rows in micro_batches for r in ranks]
        with Counter() if step == STEPS - 1 else contextlib.nullcontext() as counter:  # it costs as much as a step
            state, metrics = step_fn(state, mine, hparams(step))
        counts = dict(counter.counts) if counter else {}
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return {
        "losses": losses,
        "norms": norms,
        "counts": counts,
        "state_bytes": state_bytes,
        "params": whole(state.params),
        "moments": whole(state.opt_state),
        "cut": sum(dim is not None for dim in sharding_plan.dims.values()) if sharding_plan else 0,
    }


def relative(got: list[float], want: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(got, want))


def relative_norm(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the largest |got - want| / |want| of a leaf. (Muon makes single elements of noise as large as any.)"""
    assert list(got) == list(want)
    return max(float((got[n].float() - x.float()).norm() / x.float().norm()) for n, x in want.items())


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert list(got) == list(want)
    return max((got[n].float() - x.float()).abs().max().item() for n, x in want.items())


def modes(here: distributed.Runtime, **how: bool) -> None:
    alone = steps(here, None) if here.is_main else None
    for name, config in MODES.items():
        if here.world_size < 4 and name.startswith("hsdp"):
            continue
        got = steps(here, sharding.make_plan(config, here, model.spec(CONFIG)), **how)
        agree = distributed.all_reduce_sum([got["losses"][-1]])[0] == here.world_size * got["losses"][-1]
        if alone is None:
            continue
        found = {
            "mode": name,
            "losses": relative(got["losses"], alone["losses"]),
            "norms": relative(got["norms"], alone["norms"]),
            "params": relative_norm(got["params"], alone["params"]),
            "moments": furthest(got["moments"], alone["moments"]),
            "agree": agree,
            "share": got["state_bytes"] / alone["state_bytes"],
            "counts": got["counts"],
            "cut": got["cut"],
        }
        say("modes", found)


def few_steps(here: distributed.Runtime) -> None:
    """Run three steps in every mode."""
    global STEPS
    STEPS = 3
    modes(here)


def nonfinite(here: distributed.Runtime) -> None:
    """One rank's gradient is not finite: no rank takes the step."""
    for name in ("replicate", "zero2", "fsdp"):
        sharding_plan = sharding.make_plan(MODES[name], here, model.spec(CONFIG))
        state, step_fn = start(sharding_plan)
        before = {n: x.clone() for n, x in whole(state.params).items()}
        rows = batch(data()[0, 0][here.rank :: here.world_size])
        value_and_grad = step_fn.keywords["value_and_grad"]

        def bad(*args: Any, value_and_grad: Any = value_and_grad) -> Any:
            grads, aux = value_and_grad(*args)
            if here.rank == 1:
                grads["layers", "0", "mlp", "fc"][0, 0] = torch.nan
            return grads, aux

        state, metrics = step_fn(state, [rows], hparams(0), value_and_grad=bad)
        same = furthest(whole(state.params), before) == 0
        say("nonfinite", {"mode": name, "finite": bool(metrics["finite"]), "same": same})


def derivatives(here: distributed.Runtime) -> None:
    """Σ_ranks <gradient, direction> against the finite difference of Σ_ranks loss, through gathers, in float64."""
    sharding_plan = sharding.make_plan(MODES["fsdp"], here, model.spec(CONFIG))
    gather = sharding.gather_layer(sharding_plan, torch.float64)
    assert sharding_plan and gather
    generator = torch.Generator().manual_seed(here.rank)
    shapes = {"lm_head": (64, 64), "layers.0.attn.proj": (64, 32)}
    parts = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    sharding_plan.dims["layers.0.attn.proj"] = 1  # pyright: ignore[reportIndexIssue] (columns are sharded as well)
    ways = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    def f(parts: dict[str, Tensor]) -> Tensor:
        a, b = gather(parts).values()
        return torch.tanh(a @ b * (here.rank + 1) / 64).square().sum()

    leaves = {n: x.clone().requires_grad_() for n, x in parts.items()}
    compiled: Any = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = {}
    for name, function in {"eager": f, "compiled": compiled}.items():
        grads = torch.autograd.grad(function(leaves), list(leaves.values()))
        slope = sum(float((g * w).sum()) for g, w in zip(grads, ways.values()))
        results[name] = distributed.all_reduce_sum([slope])[0]
    step = 1e-6
    ends = [f({n: x + sign * step * ways[n] for n, x in parts.items()}) for sign in (1, -1)]
    results["difference"] = distributed.all_reduce_sum([float(ends[0] - ends[1]) / (2 * step)])[0]
    say("derivatives", results)


def graphs(here: distributed.Runtime) -> None:
    """Print the collectives of the compiled forward and backward, and how far its gradients are from eager ones."""
    global CONFIG
    CONFIG = ModelConfig(sequence_len=32, vocab_size=250, n_layer=2, n_head=4, n_kv_head=4, n_embd=64)
    found: list[dict[str, int]] = []

    def note(graph: torch.fx.Graph) -> None:
        names = [str(node.target).split(".")[1] for node in graph.nodes if "_c10d_functional." in str(node.target)]
        found.append(dict(collections.Counter(names)))

    torch._inductor.config.post_grad_custom_post_pass = note  # pyright: ignore
    sharding_plan = sharding.make_plan(MODES["fsdp"], here, model.spec(CONFIG))
    assert sharding_plan
    rows = batch(data()[0, 0][here.rank :: here.world_size])
    grads = []
    for compile in (True, False):
        state, step_fn = start(sharding_plan, compile=compile)
        params = sharding.gather(sharding_plan, state.params, torch.float32)
        grads.append(step_fn.keywords["value_and_grad"](params, rows, torch.ones(()))[0])
    error = max((a - b).abs().max().item() for a, b in zip(tree.leaves(grads[0]), tree.leaves(grads[1])))
    say("graphs", {"graphs": found, "error": error})


def run(*names: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each case, by its name."""
    cases = {case.__name__: case for case in (modes, few_steps, nonfinite, derivatives, graphs)}
    with distributed.distributed_context("cpu") as here:
        for name in names:
            cases[name](here)
    return RESULTS
