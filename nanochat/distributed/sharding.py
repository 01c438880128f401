"""Where parameters and optimizer state live: one rule, four modes, and the collectives that they need.

Between steps every leaf is a DTensor over a mesh with the axes `replicate` and `shard`: sharded along one dimension, or
full. Within a step there are only plain tensors, the shards of this rank, and explicit collectives (as with
`jax.shard_map`): the same step runs in every mode, and the mode only decides where tensors live.

    mode        mesh          parameters   gradients of a step             optimizer state
    replicate   (W, 1)        full         all-reduced                     full
    zero2       (1, W)        full         reduce-scattered                sharded; new parameters are all-gathered
    fsdp        (1, W)        sharded      reduce-scattered                sharded; layers are all-gathered when used
    hsdp        (W/s, s)      sharded      as fsdp over s ranks, then      sharded
                                           all-reduced over the W/s groups

A step uses two verbs: `gather` the parameters to compute with (`gather_layer` inside of the model), and update from the
gradients: `reduce_` them, then `optim.update`, which calls what is below "In the optimizer".

Source: ZeRO (arXiv 1910.02054); SimpleFSDP (arXiv 2411.00284), for gathers inside of a compiled graph.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

from nanochat import tree
from nanochat.config import UserError
from nanochat.distributed.config import ShardingConfig
from nanochat.distributed.runtime import Runtime
from nanochat.tree import at_least_float32

AXES = ("replicate", "shard")

Gather = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

# Logical axes that may be sharded. A parameter is sharded along its first dimension that divides, if all of its axes
# are among these; the others (layers, gates, single numbers) belong to parameters too small to be worth it.
SHARDED_AXES = {"vocab", "hidden", "heads", "kv_heads", "embed", "rank"}


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """Where the leaves of one model's state live.

    Attributes:
        dims: parameter -> dimension that is sharded, None where every rank has all of it.
        no_regather: parameters that the backward of a training step does not need: embedding tables, and the
            unembedding, whose gradient is computed in the forward (`loss.chunked`).
        gather: see ShardingConfig.
    """

    mode: str
    mesh: DeviceMesh
    dims: Mapping[str, int | None]
    no_regather: frozenset[str]
    gather: str

    @property
    def ranks(self) -> int:
        return self.mesh.size()

    @property
    def shards(self) -> int:
        """Number of shards of a leaf."""
        return self.mesh.size(1)

    @property
    def replicas(self) -> int:
        """Number of copies of every shard."""
        return self.mesh.size(0)

    @property
    def sharded(self) -> dict[str, int]:
        """Parameters of which every rank updates a shard, and the dimension of each."""
        return {name: dim for name, dim in self.dims.items() if dim is not None}

    @property
    def full(self) -> bool:
        """Whether parameters are full between steps."""
        return self.mode in ("replicate", "zero2")

    @property
    def full_in_step(self) -> bool:
        """Whether a step computes with full parameters, and so gets full gradients."""
        return self.full or self.gather == "step"

    @property
    def world(self) -> str:
        """Name of the process group of all ranks."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD.group_name

    def group(self, axis: str) -> str:
        """Name of this rank's process group along an axis."""
        return self.mesh.get_group(axis).group_name


def shard_dim(shape: Sequence[int], axes: Sequence[str], ranks: int) -> int | None:
    """Return the dimension along which a parameter is split evenly over `ranks`; None: every rank holds all of it."""
    if ranks == 1 or not SHARDED_AXES.issuperset(axes):
        return None
    return next((d for d, size in enumerate(shape) if size % ranks == 0), None)


def mesh_shape(config: ShardingConfig, world_size: int, node_ranks: int) -> tuple[int, int]:
    """Return the sizes of the axes `replicate` and `shard`; hsdp shards over the `node_ranks` of a node by default."""
    if config.mode == "replicate":
        return world_size, 1
    if config.mode != "hsdp":
        return 1, world_size
    shards = config.shard_ranks or node_ranks
    if shards < 1 or world_size % shards:
        raise UserError(f"sharding.shard_ranks={shards}: must divide the {world_size} ranks")
    return world_size // shards, shards


def describe(config: ShardingConfig, runtime: Runtime) -> str:
    """Return one line on what the configuration means for this job."""
    if runtime.world_size == 1:
        return "none: one process"
    replicas, shards = mesh_shape(config, runtime.world_size, runtime.node_ranks)
    return f"{config.resolved_mode} on {replicas} x {shards} ranks (replicate x shard)"


def make_plan(config: ShardingConfig, runtime: Runtime, spec: Mapping[str, Any]) -> ShardingPlan | None:
    """Return where the leaves of the model with table `spec` live; None in a single process: they are plain tensors.

    A warning names parameters that have a rule but no dimension that divides: every rank holds all of them.
    """
    if runtime.world_size == 1:
        return None
    shape = mesh_shape(config, runtime.world_size, runtime.node_ranks)
    mesh = _mesh(runtime.device.type, shape, dist.group.WORLD)
    dims = {name: shard_dim(row.shape, row.axes, shape[1]) for name, row in spec.items()}
    uneven = [n for n, row in spec.items() if dims[n] is None and SHARDED_AXES.issuperset(row.axes)]
    if uneven and shape[1] > 1:
        more = f" and {len(uneven) - 1} more" if len(uneven) > 1 else ""
        print(f"sharding: {uneven[0]} {spec[uneven[0]].shape}{more} do not divide by {shape[1]}: full on every rank")
    no_regather = frozenset(n for n, row in spec.items() if row.embedding or row.group == "unembedding")
    return ShardingPlan(config.resolved_mode, mesh, dims, no_regather, config.gather)


@functools.lru_cache(maxsize=4)
def _mesh(device: str, shape: tuple[int, int], world: Any) -> DeviceMesh:
    """Return the mesh of the job with process group `world`; a new one per run would fill the GPU with buffers."""
    return init_device_mesh(device, shape, mesh_dim_names=AXES)


# Between steps: DTensors


def place(plan: ShardingPlan | None, name: str, x: Tensor) -> Tensor:
    """Return full parameter `name` as it is kept between steps; the caller's tensor can be freed."""
    if plan is None:
        return x
    dim = None if plan.full else plan.dims[name]
    shard = x if dim is None else _shard(plan, x, dim).clone()
    return _wrap(plan, shard, dim, x.shape)


def zeros(plan: ShardingPlan, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return float32 zeros for a moment of parameter `name`; every rank allocates its own shard."""
    dim = state_dim(plan, name, shape)
    local_shape = [n // plan.shards if d == dim else n for d, n in enumerate(shape)]
    return _wrap(plan, torch.zeros(local_shape, device=device), dim, torch.Size(shape))


def state_dim(plan: ShardingPlan, name: str, shape: Sequence[int]) -> int | None:
    """Return the dimension along which a moment of parameter `name` is sharded; a mean over rows is smaller."""
    dim = plan.dims[name]
    if dim is None or shape[dim] % plan.shards == 0:
        return dim
    return next((d for d, size in enumerate(shape) if size % plan.shards == 0), None)


def _wrap(plan: ShardingPlan, shard: Tensor, dim: int | None, shape: torch.Size) -> DTensor:
    placements = (Replicate(), Replicate() if dim is None else Shard(dim))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(shard, plan.mesh, placements, run_check=False, shape=shape, stride=stride)


def _shard(plan: ShardingPlan, x: Tensor, dim: int) -> Tensor:
    """Return the view of a full tensor that is this rank's shard."""
    size = x.shape[dim] // plan.shards
    return x.narrow(dim, plan.mesh.get_local_rank("shard") * size, size)


@torch.no_grad()
def local_shards(state: Any) -> Any:
    """Return a tree with every DTensor replaced by this rank's shard, a plain tensor of the same memory."""
    return tree.map(lambda x: x.to_local() if isinstance(x, DTensor) else x, state)


def as_dtensors(shards: Any, like: Any) -> Any:
    """Return plain shards as DTensors that are placed as the leaves of `like`: the inverse of `local_shards`."""

    def wrap(old: Tensor, shard: Tensor) -> Tensor:
        if not isinstance(old, DTensor):
            return shard
        mesh, placements = old.device_mesh, old.placements
        return DTensor.from_local(shard, mesh, placements, run_check=False, shape=old.shape, stride=old.stride())

    return tree.map(wrap, like, shards)


@torch.no_grad()
def full_params(params: TensorDict) -> TensorDict:
    """Return all parameters as full plain tensors on every rank, for evaluation and generation. A collective call."""
    return tree.map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, params)


# Gather the parameters to compute with


def gather(plan: ShardingPlan | None, params: TensorDict, dtype: torch.dtype) -> TensorDict:
    """Return the plain tensors that a step in `dtype` computes with: full, or shards that `gather_layer` completes."""
    if plan is None:
        return params
    flat = tree.flatten(local_shards(params))
    if plan.full_in_step and not plan.full:
        flat |= zip(plan.sharded, _all_gather(plan, {name: flat[name].to(dtype) for name in plan.sharded}))
    return tree.unflatten(flat, params)


def gather_layer(plan: ShardingPlan | None, dtype: torch.dtype) -> Gather | None:
    """Return a function {name: shard} -> {name: full parameter in `dtype`} for `model.Compute`; None if not needed.

    One all-gather per layer for its weights, and one for its embedding tables. In the backward the gradients are
    reduce-scattered in the same way, in float32: a sum over the ranks. Compiled, full parameters are not kept for the
    backward but gathered again (ZeRO-3), except for those of `ShardingPlan.no_regather`; uncompiled, they are kept. A
    rank's own gradient is in `dtype` before the sum; with full parameters, that of the unembedding is in float32.
    """
    if plan is None or plan.full_in_step or plan.shards == 1:
        return None
    ranks, group = plan.shards, plan.group("shard")

    def gather(shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        full = dict(shards)
        sharded = [name for name in shards if plan.dims[name] is not None]
        for names in ([n for n in sharded if n not in plan.no_regather], [n for n in sharded if n in plan.no_regather]):
            if not names:
                continue
            # The unembedding's gradient is a sum over all tokens, too large for float16 whatever the loss scale.
            kept = torch.float32 if dtype == torch.float16 and shards[names[0]].dtype == torch.float32 else dtype
            args = (tuple(plan.dims[n] for n in names), ranks, group, kept, *[shards[n] for n in names])
            if names[0] not in plan.no_regather and torch.compiler.is_compiling() and torch.is_grad_enabled():
                gathered: Any = recompute(_Gather.apply, *args, use_reentrant=False, context_fn=_gather_again)
            else:
                gathered = _Gather.apply(*args)
            full |= zip(names, gathered)
        return full

    return gather


# Explicit, because torch 2.11 otherwise saves the result of every collective for the backward, checkpoint or not.
_gather_again = functools.partial(
    create_selective_checkpoint_contexts, lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE
)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dims: tuple[int, ...], ranks: int, group: str, dtype: torch.dtype, *shards: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dims, ctx.ranks, ctx.group, ctx.dtypes = dims, ranks, group, [shard.dtype for shard in shards]
        rows = [shard.to(dtype).movedim(dim, 0) for shard, dim in zip(shards, dims)]
        flat = torch.cat([x.reshape(-1) for x in rows])
        full = _ops.wait_tensor(_ops.all_gather_into_tensor(flat, ranks, group)).view(ranks, -1)
        pieces = full.split([x.numel() for x in rows], dim=1)
        return tuple(
            piece.reshape(ranks * x.shape[0], *x.shape[1:]).movedim(0, dim) for piece, x, dim in zip(pieces, rows, dims)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = [at_least_float32(grad).movedim(dim, 0) for grad, dim in zip(grads, ctx.dims)]
        flat = torch.cat([x.reshape(ctx.ranks, -1) for x in rows], dim=1).view(-1)
        reduced = _ops.wait_tensor(_ops.reduce_scatter_tensor(flat, "sum", ctx.ranks, ctx.group))
        pieces = reduced.split([x.numel() // ctx.ranks for x in rows])
        shards = [
            piece.view(x.shape[0] // ctx.ranks, *x.shape[1:]).movedim(0, dim).to(dtype)
            for piece, x, dim, dtype in zip(pieces, rows, ctx.dims, ctx.dtypes)
        ]
        return None, None, None, None, *shards


# Update from the gradients


def reduce_(plan: ShardingPlan | None, grads: TensorDict) -> None:
    """Replace a rank's gradients by the sum over all ranks: the shards of which this rank has the optimizer's state."""
    if plan is None:
        return
    flat = {name: at_least_float32(g) for name, g in tree.flatten(grads).items()}
    if plan.full_in_step and plan.sharded:
        rows = [flat[name].movedim(dim, 0).contiguous() for name, dim in plan.sharded.items()]
        shards = _ops.reduce_scatter_tensor_coalesced(rows, "sum", plan.shards, plan.group("shard"))
        for (name, dim), x in zip(plan.sharded.items(), shards):
            flat[name] = _ops.wait_tensor(x).movedim(0, dim)
    if plan.replicas > 1:
        flat |= zip(plan.sharded, _all_reduce([flat[name] for name in plan.sharded], plan.group("replicate")))
    small = [name for name in flat if plan.dims[name] is None]
    flat |= zip(small, _all_reduce([flat[name] for name in small], plan.world))
    for name, x in flat.items():
        grads[tuple(name.split("."))] = x  # in place, so that nobody keeps the full gradients during the update


def mean_loss_and_grad_norm(plan: ShardingPlan | None, loss: Tensor, grads: TensorDict) -> tuple[Tensor, Tensor]:
    """Return (mean loss over the ranks, norm of the full gradient), bitwise equal on every rank."""
    flat = tree.flatten(grads)
    norm = torch.nn.utils.get_total_norm
    if plan is None:
        return loss, norm(flat.values()).float()
    sharded = plan.sharded
    own = norm([g for name, g in flat.items() if name in sharded]).to(loss.device).float().square()  # of none: on CPU
    sums = _all_reduce([torch.stack([loss.float(), own])], plan.world)[0]
    mean, mean_square = sums.div(plan.ranks).unbind()
    rest = norm([g for name, g in flat.items() if name not in sharded]).to(loss.device).float().square()
    return mean, (mean_square * plan.shards + rest).sqrt()


# In the optimizer


def param_shards(plan: ShardingPlan, params: TensorDict) -> TensorDict:
    """Return the parameter shards that this rank updates, as plain tensors that share the memory of `params`."""
    flat = tree.flatten(local_shards(params))
    if plan.full:
        flat |= {name: _shard(plan, flat[name], dim) for name, dim in plan.sharded.items()}
    return tree.unflatten(flat, params)


def start_all_gather_(plan: ShardingPlan, name: str, param: Tensor) -> Callable[[], Any]:
    """Start to copy the shards that the other ranks have updated into a full parameter, in place; return the wait.

    In the parameter's own dtype, as its copies must be equal on all ranks. The group is that of all ranks, here the
    same ones as along the shard axis, so that Muon's exchanges do not queue behind this.
    """
    dim = plan.dims[name]
    if dim is None or not plan.full:
        return lambda: None
    full = local_shards(param)
    shard = _shard(plan, full, dim)
    if dim == 0:  # without a second copy
        gathered = _ops.all_gather_into_tensor_out(shard, plan.shards, plan.world, out=full)
        return lambda: _ops.wait_tensor(gathered)
    rows = _ops.all_gather_into_tensor(shard.movedim(dim, 0).contiguous(), plan.shards, plan.world)
    return lambda: full.copy_(_ops.wait_tensor(rows).movedim(0, dim))


class MuonAllToAll(NamedTuple):
    """Converts a stack of matrices between a shard of each on every rank and a few full ones, which Muon needs.

    Each direction is one all-to-all over the `group` of the shard axis. The matrices are sharded along `dim`, their
    second moments along `moment_dim` (None: every rank has all of those).
    """

    ranks: int
    rank: int
    group: str
    dim: int
    moment_dim: int | None

    def gather(self, x: Tensor, dim: int | None) -> Tensor:
        """Return this rank's full matrices (ceil(n / ranks), …) from shards (n, …), padded with zeros."""
        each = -(-x.shape[0] // self.ranks)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, each * self.ranks - x.shape[0]))
        if dim is None:
            return x.narrow(0, self.rank * each, each)
        x = self._swap(x).unflatten(0, (self.ranks, each))  # shard of rank i, matrix, …
        return x.movedim(0, dim + 1).flatten(dim + 1, dim + 2)

    def scatter(self, x: Tensor, dim: int | None, n: int) -> Tensor:
        """Return this rank's shards of all `n` matrices, from the full ones of the ranks."""
        if dim is None:
            return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), self.ranks, self.group))[:n]
        x = x.unflatten(dim + 1, (self.ranks, -1)).movedim(dim + 1, 0).flatten(0, 1)
        return self._swap(x)[:n]

    def _swap(self, x: Tensor) -> Tensor:
        sizes = [x.shape[0] // self.ranks] * self.ranks
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), sizes, sizes, self.group))


def muon_all_to_all(plan: ShardingPlan, name: str, moment_shape: Sequence[int]) -> MuonAllToAll | None:
    """Return the exchange for matrix `name`, given the shape of its full second moment; None: it is not sharded."""
    rank, dim = plan.mesh.get_local_rank("shard"), plan.dims[name]
    if dim is None:
        return None
    return MuonAllToAll(plan.shards, rank, plan.group("shard"), dim, state_dim(plan, name, moment_shape))


_ops = torch.ops._c10d_functional  # the dispatcher's: the functions around them changed names between torch versions


def _all_gather(plan: ShardingPlan, shards: Mapping[str, Tensor]) -> list[Tensor]:
    sharded = plan.sharded
    dims = [sharded[name] for name in shards]
    rows = [x.movedim(dim, 0).contiguous() for x, dim in zip(shards.values(), dims)]
    if not rows:
        return []
    full = _ops.all_gather_into_tensor_coalesced(rows, plan.shards, plan.group("shard"))
    return [_ops.wait_tensor(x).movedim(0, dim) for x, dim in zip(full, dims)]


def _all_reduce(xs: list[Tensor], group: str) -> list[Tensor]:
    return [_ops.wait_tensor(x) for x in _ops.all_reduce_coalesced_(xs, "sum", group)] if xs else []
