"""The functions of a run's steps, compiled and sharded as its settings say, and the micro-batch that fits."""

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanochat import distributed, model, tree
from nanochat.config import UserError
from nanochat.distributed import Runtime, ShardingPlan, sharding
from nanochat.metrics import noise_scale
from nanochat.model import Compute, ModelConfig, Params, ParamSpec, attention, loss
from nanochat.model import linear as linears
from nanochat.optim import MATRIX
from nanochat.optim.muon_adamw import POLAR_EXPRESS
from nanochat.train import functional, planner, step
from nanochat.train.config import StageConfig
from nanochat.train.step import StepFn, TrainState, Update

# Many micro-batches share an update that takes a small part of the step: a smaller batch would be as fast.
MANY_MICRO_BATCHES, SMALL_UPDATE = 16, 0.02
ADAMW_FLOPS = 9000  # of a parameter: it moves 30 bytes, and an H100 multiplies 300 FLOPs in the time of a byte
CPU_ROWS = 32  # on the CPU, larger micro-batches take memory and save nothing


class Lora(NamedTuple):
    """Adapters to train, and the model that they are of."""

    base: Params  # all of it on every rank, in the compute dtype
    spec: Mapping[str, ParamSpec]  # of the adapters
    meta: Mapping[str, Any]  # in their checkpoints: rank, alpha, targets, and the base's run, step and fingerprint

    def adapted(self, loss_fn: Callable[..., Any], all_gather: distributed.Gather | None) -> Callable[..., Any]:
        """Return a loss of the model as a loss of the adapters, which `all_gather` completes where they are shards."""
        base = tree.nest(tree.flatten(self.base))

        def of_adapters(adapters: TensorDict, batch: Mapping[str, Any]) -> Any:
            if all_gather is not None:
                adapters = tree.unflatten(all_gather(tree.flatten(adapters)), adapters)
            return loss_fn(model.lora.merge(base, adapters), batch)

        return of_adapters


def full_params(params: TensorDict, lora: Lora | None = None) -> Params:
    """Return the model of a train state on every rank, with merged adapters. A collective call."""
    params = sharding.full_params(params)
    return params if lora is None else model.lora.merge(lora.base, params)


def build_step_functions(
    config: StageConfig,
    shape: ModelConfig,
    runtime: Runtime,
    sharding_plan: ShardingPlan | None = None,
    lora: Lora | None = None,
    objective: Callable[..., Any] = loss.next_token,
) -> tuple[Callable, Callable, str]:
    """Return (the train step, the loss for evaluation, their kernels as text), compiled if the settings say so.

    The loss for evaluation is `loss.next_token`, with `lora` that of the model, as from `full_params`.

    Args:
        lora: what to train adapters of. objective: the loss to train on, with the arguments of `loss.next_token`.
    """
    require_compiler(config, runtime)
    dtype = runtime.compute_dtype
    chosen, torch_func = choose_attention(config, shape, runtime), config.train.grad == "torch_func"
    try:
        attend = attention.build(chosen.names, shape.sequence_len, runtime.device)
    except ImportError as error:  # on another node than rank 0's
        raise UserError(
            f"train.attention: rank 0 has {chosen.text}, and here {error}; install it, or set sdpa"
        ) from None
    if torch_func and attention.CUSTOM_BACKWARD.intersection(chosen.names.values()):
        attend = functional.with_visible_backward(attend)
    linear, precision = linears.choose(config.train.linear, runtime.device)
    chunk = chunk_tokens(config, runtime)
    gather = sharding.gather_layer(sharding_plan, dtype)
    if torch_func and gather:
        raise UserError(
            f"train.grad=torch_func: sharding.mode={config.sharding.resolved_mode} gathers each layer inside of the "
            "gradient, which torch.func cannot differentiate; set sharding.gather=step, sharding.mode=zero2 or "
            "train.grad=autograd"
        )
    if torch_func and config.train.memory_budget != 1:  # it is for a backward that is a graph of its own
        raise UserError(
            f"train.memory_budget={config.train.memory_budget} has no effect with train.grad=torch_func: set "
            "train.grad=autograd"
        )
    overlap = gather is not None and config.sharding.overlap and runtime.device.type == "cuda"
    compile_fn = functools.partial(distributed.compile_fn, overlap=overlap, memory_budget=config.train.memory_budget)
    compile = compile_fn if config.compile else lambda f: f
    compute = Compute(dtype=dtype, attend=attend, all_gather=None if lora else gather)
    next_token = functools.partial(loss.next_token, config=shape, chunk_tokens=chunk)
    fast = dataclasses.replace(compute, linear=linear)
    loss_fn = functools.partial(objective, config=shape, chunk_tokens=chunk, compute=fast)
    loss_fn = lora.adapted(loss_fn, gather) if lora else loss_fn
    value_and_grad = step.gradient(loss_fn, grad=config.train.grad, compile=compile)
    casts_once = linear is linears.dense and not lora and not gather  # fp8 quantizes the float32 matrices
    matrices = [n for n, row in model.spec(shape).items() if casts_once and row.matmul and row.group != "unembedding"]
    update = step.make_update(compute_dtype=dtype, donate=True, compile=config.compile, sharding_plan=sharding_plan)
    train_step = functools.partial(
        step.train_step,
        value_and_grad=value_and_grad,
        update=with_ema(update, config.train.ema, sharding_plan) if config.train.ema else update,
        gather=lambda params: cast_params(sharding.gather(sharding_plan, params, dtype), matrices, dtype),
    )
    eval_fn = compile(functools.partial(next_token, compute=compute))
    return train_step, eval_fn, f"attention {chosen.text}; linear layers {precision}"


def cast_params(params: TensorDict, names: Sequence[str], dtype: torch.dtype) -> TensorDict:
    """Return the parameters with those of these names in `dtype`: once a step, not again in every micro-batch."""
    params = params.copy()
    for key in (tuple(name.split(".")) for name in names):
        params[key] = params[key].to(dtype)
    return params


def make_step_fn(
    config: StageConfig, train_step: Any, make_step: Callable[..., StepFn], sharding_plan: ShardingPlan | None
) -> StepFn:
    """Return the loop's step, which measures the gradient noise scale as often as the settings say.

    Args:
        train_step: from `build_step_functions`. make_step: see `stage.Stage`.
    """
    plain, every = make_step(train_step, config.rows), config.metrics.noise_scale_every
    if not every:
        return plain
    measured = noise_scale.measured(train_step, train_step.keywords["value_and_grad"], sharding_plan)
    measuring = make_step(measured, config.rows)

    def step_fn(state: TrainState, batch: Any, number: int, stats: step.Stats) -> tuple[TrainState, step.Metrics]:
        return (plain if (number + 1) % every else measuring)(state, batch, number, stats)

    return step_fn


def require_compiler(config: StageConfig, runtime: Runtime) -> None:
    if config.compile and runtime.device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if not shutil.which(compiler):
            raise UserError(f"compile=true needs a C++ compiler on the CPU: install {compiler}, or set compile=false")


def choose_attention(config: StageConfig, shape: ModelConfig, runtime: Runtime) -> attention.KernelChoice:
    """Return the attention kernel of each window, the same on all ranks."""
    kernel = config.train.attention
    if kernel == "auto" and not config.compile:
        kernel = "sdpa"
    if kernel == "flex" and config.train.grad == "torch_func":
        raise UserError("train.attention=flex has no gradient by torch.func: set another kernel or train.grad=autograd")
    heads = (shape.n_head, shape.n_kv_head, shape.head_dim)
    try:
        with distributed.raise_on_any_failure():
            choice = attention.choose(
                kernel, shape.sequence_len, shape.windows, heads, runtime.device, runtime.compute_dtype,
                rows=config.rows, compile=config.compile, torch_func=config.train.grad == "torch_func",
            )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    return distributed.broadcast_object(choice)  # the ranks measure different times, so rank 0 decides


def chunk_tokens(config: StageConfig, runtime: Runtime) -> int:
    """Return the tokens whose logits live at once in the loss."""
    return config.train.chunk_tokens or (1024 if runtime.device.type == "cpu" else 8192)


def init_state(
    config: StageConfig,
    shape: ModelConfig,
    runtime: Runtime,
    sharding_plan: ShardingPlan | None,
    device: torch.device | str | None = None,
    lora: Lora | None = None,
) -> TrainState:
    """Return the state before the first step, of the model or of adapters, by default on the runtime's device."""
    dtype, options = runtime.compute_dtype, {"device": device or runtime.device, "sharding_plan": sharding_plan}
    if lora:
        settings = {name: lora.meta[name] for name in ("rank", "targets", "alpha")}
        adapters = model.lora.init(shape, config.seed, **settings, **options)
        return as_configured(config, step.init(adapters, lora.spec, dtype, sharding_plan), sharding_plan)
    params = model.init(shape, config.seed, dtype=dtype, **options)
    return as_configured(config, step.init(params, model.spec(shape), dtype, sharding_plan), sharding_plan)


def as_configured(config: StageConfig, state: TrainState, sharding_plan: ShardingPlan | None) -> TrainState:
    """Return the state with the average of the weights and the dtype of moments that the settings ask for."""
    return require_ema(config, with_embedding_moments(config.train.embedding_moments, state), sharding_plan)


def with_embedding_moments(dtype: str, state: TrainState) -> TrainState:
    """Return the state with AdamW's moments of token and value embeddings stored in `dtype`."""
    groups = [group for group in planner.EMBEDDINGS if group in state.opt_state.keys()]  # noqa: SIM118 (adapters)
    cast = {group: tree.map(lambda x: x.to(getattr(torch, dtype)), state.opt_state[group]) for group in groups}
    return state._replace(opt_state=TensorDict({**state.opt_state, **cast}, batch_size=[]))


def like_saved(abstract: TrainState, saved: Mapping[str, Any]) -> TrainState:
    """Return the state to restore into: with an average of the weights and moments as those of a checkpoint.

    Args:
        saved: the state that `checkpoint.inspect` describes.
    """
    names = [name for name in saved if name.startswith(tuple(f"opt_state.{group}." for group in planner.EMBEDDINGS))]
    if names:
        abstract = with_embedding_moments(saved[names[0]]["dtype"], abstract)
    return abstract if any(name.startswith("ema.") for name in saved) else abstract._replace(ema=step.NO_EMA)


# The exponential average of the weights, `train.ema`


def require_ema(config: StageConfig, state: TrainState, sharding_plan: ShardingPlan | None) -> TrainState:
    """Return the state with an average of the weights, if the settings want one; a new one starts from the weights."""
    if not config.train.ema or not state.ema.is_empty():
        return state
    if not state.step.is_meta and state.step:
        print(f"train.ema: the average of the weights starts at step {int(state.step)}")
    return state._replace(ema=init_ema(state.params, sharding_plan))


@torch.no_grad()
def init_ema(params: TensorDict, sharding_plan: ShardingPlan | None) -> TensorDict:
    """Return the average before its first step: the parameters in float32, sharded as the optimizer's state is."""
    flat, device = tree.flatten(params), tree.leaves(params)[0].device
    zeros = functools.partial(sharding.zeros, sharding_plan, device=device) if sharding_plan else None
    ema = {name: zeros(name, x.shape) if zeros else torch.zeros(x.shape, device=device) for name, x in flat.items()}
    for average, x in zip(ema.values(), updated_shards(params, sharding_plan).values()):
        sharding.local_shards(average).copy_(x)
    steps = torch.zeros((), dtype=torch.int64, device=device)
    return TensorDict({"params": tree.unflatten(ema), "steps": steps}, batch_size=[])


def with_ema(update: Update, decay: float, sharding_plan: ShardingPlan | None) -> Update:
    """Return `update` that moves the average of the weights too, in place, by each step that is not skipped.

        average ← average + (params - average) · (1 - decay) / (1 - decay^n)    at the n-th

    The weights of an age of k steps count by decay^k, and the initial ones not at all: debiased, as moments are in Adam
    (arXiv 1412.6980).
    """

    @torch.no_grad()
    def update_with_ema(state: TrainState, *args: Any) -> Any:
        state, metrics = update(state, *args)
        n, averages = state.ema["steps"] + metrics["finite"], tree.flatten(sharding.local_shards(state.ema["params"]))
        weight = (1 - decay) / -torch.expm1(n.clamp_min(1).float() * math.log(decay)) * metrics["finite"]
        for average, x in zip(averages.values(), updated_shards(state.params, sharding_plan).values()):
            average.lerp_(x.float(), weight)
        state.ema["steps"].copy_(n)
        return state, metrics

    return update_with_ema


def updated_shards(params: TensorDict, sharding_plan: ShardingPlan | None) -> dict[str, Tensor]:
    """Return the parameters of which this rank has the optimizer's state, as views."""
    return tree.flatten(params if sharding_plan is None else sharding.param_shards(sharding_plan, params))


@torch.no_grad()
def ema_params(state: TrainState) -> TensorDict:
    """Return the average of the weights as parameters, in the dtypes and placements of these."""

    def like(param: Tensor, average: Tensor) -> Tensor:
        if isinstance(param, DTensor) and isinstance(average, DTensor):
            average = average.redistribute(param.device_mesh, param.placements)
        return average.to(param.dtype)

    flat = tree.flatten(state.ema["params"])
    return tree.unflatten({name: like(x, flat[name]) for name, x in tree.flatten(state.params).items()}, state.params)


def planner_setup(config: StageConfig, runtime: Runtime) -> planner.Setup:
    """Return the settings as the planner takes them."""
    return planner.Setup(
        mode=config.sharding.resolved_mode,
        world_size=runtime.world_size,
        shard_ranks=sharding.mesh_shape(config.sharding, runtime.world_size, runtime.node_ranks)[1],
        dtype=runtime.compute_dtype,
        fp8=config.train.linear == "fp8",
        chunk_tokens=chunk_tokens(config, runtime),
        node_ranks=runtime.node_ranks,
        lora_rank=config.lora.rank,
        lora_targets=config.lora.targets,
        ema=config.train.ema > 0,
        memory_budget=config.train.memory_budget,
        embedding_moments=getattr(torch, config.train.embedding_moments),
    )


def estimate_batch_size(config: StageConfig, shape: ModelConfig, rows: int, runtime: Runtime) -> int:
    """Return the largest micro-batch that divides a rank's `rows` of a step and fits by the planner's estimate."""
    capacity = distributed.free_bytes(runtime.device, runtime.node_ranks)
    fits = planner.largest_batch(shape, planner_setup(config, runtime), rows, capacity) or 0
    least = -distributed.all_reduce_max(-fits)
    if not least:
        raise UserError(
            f"device_batch_size=auto: not even one row of {shape.sequence_len} tokens fits into the "
            f"{capacity / 2**30:.1f} GiB that are free; lower depth, or share the state: --set sharding.mode=fsdp"
        )
    if runtime.device.type == "cpu":
        least = max(n for n in range(1, min(least, CPU_ROWS) + 1) if rows % n == 0)
    return least


def try_batch_size(
    config: StageConfig, shape: ModelConfig, rows: int, runtime: Runtime, sharding_plan: ShardingPlan | None,
    make_step: Callable[[int], StepFn], lora: Lora | None = None,
) -> int:  # fmt: skip
    """Return the first micro-batch from `config.rows` downwards that fits, seen by a step on a state thrown away.

    On the CPU, where running out of memory ends the process, the estimate has to do. With several ranks there is one
    trial: a rank that fails alone cannot be helped.

    Args:
        rows: of a step, on this rank. make_step: rows of a micro-batch -> the loop's step.
    """
    if runtime.device.type == "cpu":
        return config.rows
    for tried in [n for n in range(config.rows, 0, -1) if rows % n == 0]:
        # Two micro-batches, if there are as many, need an accumulator.
        ids = torch.zeros((min(rows, 2 * tried), shape.sequence_len), dtype=torch.int64, device=runtime.device)
        try:
            step_fn = make_step(tried)
            state = init_state(config, shape, runtime, sharding_plan, lora=lora)
            step_fn(state, {"inputs": ids, "targets": ids}, 0, {})
            distributed.synchronize(runtime.device)
            return tried
        except torch.OutOfMemoryError:
            if runtime.world_size > 1:  # the others wait for this rank in a collective
                raise UserError(f"device_batch_size=auto: {tried} rows run out of memory; set a lower number") from None
        finally:
            torch.cuda.empty_cache()
        print(f"device_batch_size={tried} runs out of memory; trying less")
    raise UserError("device_batch_size=auto: not even one row fits; lower depth, or set sharding.mode=fsdp")


@contextlib.contextmanager
def out_of_memory_as_user_error(config: StageConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"device_batch_size={config.device_batch_size} runs out of memory ({str(error).split('. ')[0]}); "
            "set a smaller one, or auto; --experiment=plan shows what fits"
        ) from None


def advise_accumulation(stage: str, spec: Mapping[str, ParamSpec], micro_batches: int, flops: float) -> None:
    """Print that the batch may be smaller, if a step is many micro-batches and the optimizer a small part of it.

    Args:
        spec: of what is trained. flops: of all micro-batches of a step, forward and backward, on a rank.
    """
    if stage in ("rl", "dpo") or micro_batches < MANY_MICRO_BATCHES:  # those count prompts and pairs
        return
    update = sum(muon_flops(row.shape) if row.group == MATRIX else ADAMW_FLOPS * row.numel for row in spec.values())
    if (share := update / (update + flops)) < SMALL_UPDATE:
        print(
            f"gradient accumulation: a step is {micro_batches} micro-batches, the optimizer about {share:.1%} of it. "
            "Half the total_batch_size trains on as many tokens a second, in twice the steps; "
            "--set metrics.noise_scale_every=10 shows which batch still pays"
        )


def muon_flops(shape: Sequence[int]) -> int:
    """Return the FLOPs of `optim.orthogonalize` on a matrix."""
    small, large = sorted(shape)
    return len(POLAR_EXPRESS) * (4 * large * small**2 + 2 * small**3)


def advise_all_gpus(runtime: Runtime) -> None:
    """Print how to use all GPUs of this machine that CUDA_VISIBLE_DEVICES shows, if there are more than ranks on it."""
    count = torch.cuda.device_count() if runtime.device.type == "cuda" else 0
    if count > runtime.node_ranks:
        nodes = " …" * (runtime.world_size > runtime.node_ranks)  # the options of torchrun for several
        command = f"torchrun --nproc_per_node={count}{nodes} {shlex.join(sys.argv)}"
        print(f"this run uses {runtime.node_ranks} of the {count} GPUs of this machine; all: {command}", flush=True)
