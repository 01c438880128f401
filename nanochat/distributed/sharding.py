"""Where parameters and optimizer state lie: one rule table, four modes, and the few collectives that they need.

At rest every leaf is a DTensor over a mesh with the axes `replicate` and `shard`: cut along one dimension over `shard`,
or whole. Within a step there are only plain tensors, this rank's parts, and explicit collectives (what
`jax.shard_map` is in JAX): the same step runs in every mode, and the mode is nothing but where things lie.

    mode        mesh          parameters   gradients of a step             optimizer state
    replicate   (W, 1)        whole        all-reduced                     whole
    zero2       (1, W)        whole        reduce-scattered                cut; new parameters are all-gathered
    fsdp        (1, W)        cut          reduce-scattered                cut; layers are all-gathered as they are used
    hsdp        (W/s, s)      cut          as fsdp over s ranks, then      cut
                                           all-reduced over the W/s groups

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

AXES = ("replicate", "shard")

Gather = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

# Logical axis -> mesh axis. The first dimension of a parameter that divides is cut, if all of its axes have a rule;
# the others (layers, gates, single numbers) belong to parameters too small to be worth it.
RULES = {"vocab": "shard", "hidden": "shard", "heads": "shard", "kv_heads": "shard", "embed": "shard"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the leaves of one model's state lie.

    Attributes:
        mode: one of the four. mesh: with the axes `replicate` and `shard`.
        dims: parameter -> dimension that is cut over `shard`, None where every rank has it whole.
        once: parameters that the backward of a training step does not need: tables, which are only looked up, and
            the unembedding, whose gradient is made in the forward (`loss.chunked`).
        whole: whether parameters stay whole between steps (replicate, zero2).
        gather: see ShardingConfig.
    """

    mode: str
    mesh: DeviceMesh
    dims: Mapping[str, int | None]
    once: frozenset[str]
    whole: bool
    gather: str

    @property
    def ranks(self) -> int:
        """Number of ranks in the job."""
        return self.mesh.size()

    @property
    def shards(self) -> int:
        """Number of parts that a leaf is cut into."""
        return self.mesh.size(1)

    @property
    def replicas(self) -> int:
        """Number of copies of every part."""
        return self.mesh.size(0)

    @property
    def cut(self) -> list[str]:
        """Parameters of which every rank updates a part."""
        return [name for name, dim in self.dims.items() if dim is not None]

    @property
    def everyone(self) -> str:
        """Name of the process group of all ranks."""
        assert dist.group.WORLD is not None
        return dist.group.WORLD.group_name

    def group(self, axis: str) -> str:
        """Return the name of this rank's process group along an axis."""
        return self.mesh.get_group(axis).group_name

    @property
    def whole_in_step(self) -> bool:
        """Whether a step computes with whole parameters, and so gets whole gradients."""
        return self.whole or self.gather == "step"


def shard_dim(shape: Sequence[int], axes: Sequence[str], ranks: int, rules: Mapping[str, str] = RULES) -> int | None:
    """Return the dimension of a parameter that is cut into `ranks` even parts, or None: every rank holds it whole.

    Args:
        shape: sizes. axes: logical name of each, as in `model.ParamSpec`. ranks: of the mesh's shard axis.
    """
    if any(axis not in rules for axis in axes) or ranks == 1:
        return None
    return next((d for d, size in enumerate(shape) if size % ranks == 0), None)


def mesh_shape(config: ShardingConfig, world_size: int, node_ranks: int) -> tuple[int, int]:
    """Return the sizes of the axes `replicate` and `shard`.

    Args:
        config: the mode. world_size: ranks of the job. node_ranks: ranks of a node, for hsdp.

    Raises:
        UserError: hsdp's groups do not divide the job.
    """
    if config.mode == "replicate":
        return world_size, 1
    if config.mode != "hsdp":
        return 1, world_size
    shards = config.shard_ranks or node_ranks
    if shards < 1 or world_size % shards:
        raise UserError(f"sharding.shard_ranks={shards}: must divide the {world_size} ranks")
    return world_size // shards, shards


def describe(config: ShardingConfig, runtime: Runtime) -> str:
    """Return what the configuration means for a job, for people."""
    if runtime.world_size == 1:
        return "none: one process"
    replicas, shards = mesh_shape(config, runtime.world_size, runtime.node_ranks)
    return f"{resolve(config).mode} on {replicas} x {shards} ranks (replicate x shard)"


def resolve(config: ShardingConfig) -> ShardingConfig:
    """Return the configuration with a mode in the place of auto."""
    return dataclasses.replace(config, mode="zero2") if config.mode == "auto" else config


def make_layout(config: ShardingConfig, runtime: Runtime, spec: Mapping[str, Any]) -> Layout | None:
    """Return where the leaves of a model with this table lie, or None in a process alone, where they are plain tensors.

    A parameter that has a rule and no dimension that divides is held whole by every rank, and that is said.

    Raises:
        UserError: the mesh cannot be made; see `mesh_shape`.
    """
    if runtime.world_size == 1:
        return None
    mode = resolve(config).mode
    shape = mesh_shape(config, runtime.world_size, runtime.node_ranks)
    mesh = _mesh(runtime.device.type, shape, dist.group.WORLD)
    dims = {name: shard_dim(row.shape, row.axes, shape[1]) for name, row in spec.items()}
    stuck = [n for n, row in spec.items() if dims[n] is None and shape[1] > 1 and all(a in RULES for a in row.axes)]
    if stuck:
        more = f" and {len(stuck) - 1} more" if len(stuck) > 1 else ""
        print(f"sharding: {stuck[0]} {spec[stuck[0]].shape}{more} do not divide by {shape[1]}: whole on every rank")
    once = frozenset(name for name, row in spec.items() if row.embedding or row.group == "unembedding")
    return Layout(mode, mesh, dims, once, mode in ("replicate", "zero2"), config.gather)


@functools.lru_cache(maxsize=4)
def _mesh(device: str, shape: tuple[int, int], world: Any) -> DeviceMesh:
    """Return the mesh of a job, one of each shape: with one a run, a series would fill the GPU with NCCL's buffers.

    Args:
        world: the job's process group, which tells one job of the process from the next.
    """
    return init_device_mesh(device, shape, mesh_dim_names=AXES)


# At rest: DTensors


def place(layout: Layout | None, name: str, x: Tensor) -> Tensor:
    """Return parameter `name`, given whole, as it lies between steps; the caller's tensor can be freed."""
    if layout is None:
        return x
    dim = None if layout.whole else layout.dims[name]
    part = x if dim is None else _part(layout, x, dim).clone()
    return _wrap(layout, part, dim, x.shape)


def zeros(layout: Layout, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return float32 zeros for a moment of parameter `name`, of which every rank allocates its own part."""
    dim = state_dim(layout, name, shape)
    local = [n // layout.shards if d == dim else n for d, n in enumerate(shape)]
    return _wrap(layout, torch.zeros(local, device=device), dim, torch.Size(shape))


def state_dim(layout: Layout, name: str, shape: Sequence[int]) -> int | None:
    """Return the dimension along which a moment of parameter `name` is cut; a mean over rows has less of them."""
    dim = layout.dims[name]
    if dim is None or shape[dim] % layout.shards == 0:
        return dim
    return next((d for d, size in enumerate(shape) if size % layout.shards == 0), None)


def _wrap(layout: Layout, part: Tensor, dim: int | None, shape: torch.Size) -> DTensor:
    placements = (Replicate(), Replicate() if dim is None else Shard(dim))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, layout.mesh, placements, run_check=False, shape=shape, stride=stride)


def _part(layout: Layout, x: Tensor, dim: int) -> Tensor:
    """Return the view of a whole tensor that is this rank's part."""
    size = x.shape[dim] // layout.shards
    return x.narrow(dim, layout.mesh.get_local_rank("shard") * size, size)


@torch.no_grad()
def local(state: Any) -> Any:
    """Return a tree with every DTensor replaced by this rank's plain part of it, which shares its memory."""
    return tree.map(lambda x: x.to_local() if isinstance(x, DTensor) else x, state)


def like(state: Any, parts: Any) -> Any:
    """Return plain `parts` as DTensors that lie as the leaves of `state` do: the inverse of `local`."""

    def wrap(old: Tensor, part: Tensor) -> Tensor:
        if not isinstance(old, DTensor):
            return part
        mesh, placements = old.device_mesh, old.placements
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=old.shape, stride=old.stride())

    return tree.map(wrap, state, parts)


@torch.no_grad()
def whole(params: TensorDict) -> TensorDict:
    """Return parameters as they lie as whole plain tensors, on every rank: what evaluates or generates takes these.

    All ranks call it together. What a rank has whole already is not copied.
    """
    return tree.map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, params)


# In a step: plain tensors and collectives


def enter(layout: Layout | None, params: TensorDict, dtype: torch.dtype) -> TensorDict:
    """Return the parameters as a step computes with them: this rank's plain tensors, whole or parts.

    Args:
        params: as they lie. dtype: of the computation, in which parameters are gathered.
    """
    if layout is None:
        return params
    flat = tree.flatten(local(params))
    if layout.whole_in_step and not layout.whole:
        cut = layout.cut
        flat |= zip(cut, _all_gather(layout, {name: flat[name].to(dtype) for name in cut}))
    return tree.unflatten(flat, params)


def gatherer(layout: Layout | None, dtype: torch.dtype) -> Gather | None:
    """Return {name: this rank's part} -> {name: whole parameter in `dtype`}, for `model.Compute`; None: no need of it.

    What is asked for together, a layer, is one collective, and its tables another; in the backward its gradients are
    reduce-scattered together, in float32, a sum over the ranks. Compiled, whole parameters are not kept for the
    backward but gathered once more (ZeRO-3), but for those of `Layout.once`; uncompiled, they live until then. A rank's
    own gradient is in `dtype` before the sum; with whole parameters, that of the unembedding is in float32.
    """
    if layout is None or layout.whole_in_step or layout.shards == 1:
        return None
    ranks, group = layout.shards, layout.group("shard")

    def gather(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = dict(parts)
        cut = [name for name in parts if layout.dims[name] is not None]
        for names in ([n for n in cut if n not in layout.once], [n for n in cut if n in layout.once]):
            if not names:
                continue
            # The unembedding's gradient is a sum over all tokens, too large for float16 whatever the loss scale.
            kept = torch.float32 if dtype == torch.float16 and parts[names[0]].dtype == torch.float32 else dtype
            args = (tuple(layout.dims[n] for n in names), ranks, group, kept, *[parts[n] for n in names])
            again = names[0] not in layout.once and torch.compiler.is_compiling() and torch.is_grad_enabled()
            how = {"use_reentrant": False, "context_fn": _gather_again}
            found: Any = recompute(_Gather.apply, *args, **how) if again else _Gather.apply(*args)
            whole |= zip(names, found)
        return whole

    return gather


# Said outright, as torch 2.11 otherwise saves the result of every collective for the backward, checkpoint or not.
_gather_again = functools.partial(
    create_selective_checkpoint_contexts, lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE
)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dims: tuple[int, ...], ranks: int, group: str, dtype: torch.dtype, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.dims, ctx.ranks, ctx.group, ctx.dtypes = dims, ranks, group, [part.dtype for part in parts]
        rows = [part.to(dtype).movedim(dim, 0) for part, dim in zip(parts, dims)]
        flat = torch.cat([x.reshape(-1) for x in rows])
        whole = _ops.wait_tensor(_ops.all_gather_into_tensor(flat, ranks, group)).view(ranks, -1)
        pieces = whole.split([x.numel() for x in rows], dim=1)
        return tuple(
            piece.reshape(ranks * x.shape[0], *x.shape[1:]).movedim(0, dim) for piece, x, dim in zip(pieces, rows, dims)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows = [_at_least_float32(grad).movedim(dim, 0) for grad, dim in zip(grads, ctx.dims)]
        flat = torch.cat([x.reshape(ctx.ranks, -1) for x in rows], dim=1).view(-1)
        part = _ops.wait_tensor(_ops.reduce_scatter_tensor(flat, "sum", ctx.ranks, ctx.group))
        pieces = part.split([x.numel() // ctx.ranks for x in rows])
        parts = [
            piece.view(x.shape[0] // ctx.ranks, *x.shape[1:]).movedim(0, dim).to(dtype)
            for piece, x, dim, dtype in zip(pieces, rows, ctx.dims, ctx.dtypes)
        ]
        return None, None, None, None, *parts


def reduce(layout: Layout | None, grads: TensorDict) -> TensorDict:
    """Return the sum of all ranks' gradients; every rank gets the parts of which it has the optimizer's state.

    The gradients are given up: what is all-reduced is so in their memory.
    One reduction over the shard axis (which `gatherer` has done already), one over the replicas, and one for the
    small parameters.
    """
    if layout is None:
        return grads
    flat = {name: _at_least_float32(g) for name, g in tree.flatten(grads).items()}
    cut = layout.cut
    if layout.whole_in_step and cut:
        rows = [flat[name].movedim(layout.dims[name] or 0, 0).contiguous() for name in cut]
        parts = _ops.reduce_scatter_tensor_coalesced(rows, "sum", layout.shards, layout.group("shard"))
        flat |= {name: _ops.wait_tensor(x).movedim(0, layout.dims[name] or 0) for name, x in zip(cut, parts)}
    if layout.replicas > 1:
        flat |= zip(cut, _all_reduce([flat[name] for name in cut], layout.group("replicate")))
    small = [name for name in flat if layout.dims[name] is None]
    flat |= zip(small, _all_reduce([flat[name] for name in small], layout.everyone))
    return tree.unflatten(flat, grads)


def loss_and_norm(layout: Layout | None, loss: Tensor, grads: TensorDict) -> tuple[Tensor, Tensor]:
    """Return (mean loss over the ranks, norm of the whole gradient), the same bits on every rank.

    Args:
        loss: 0-d, of this rank. grads: from `reduce`.
    """
    flat = tree.flatten(grads)
    norm = torch.nn.utils.get_total_norm
    if layout is None:
        return loss, norm(flat.values()).float()
    cut = set(layout.cut)
    ours = norm([g for name, g in flat.items() if name in cut]).to(loss.device).float().square()  # of none: on the CPU
    both = torch.stack([loss.float(), ours])
    mean, mean_square = _all_reduce([both], layout.everyone)[0].div(layout.ranks).unbind()
    rest = norm([g for name, g in flat.items() if name not in cut]).to(loss.device).float().square()
    return mean, (mean_square * layout.shards + rest).sqrt()


def parts(layout: Layout | None, params: TensorDict) -> TensorDict:
    """Return what of the parameters this rank updates, as plain tensors that share the memory of `params`."""
    if layout is None:
        return params
    flat = tree.flatten(local(params))
    if layout.whole:
        flat |= {name: _part(layout, flat[name], layout.dims[name] or 0) for name in layout.cut}
    return tree.unflatten(flat, params)


def join(layout: Layout | None, parts: TensorDict) -> TensorDict:
    """Return updated parts as they lie at rest, but as plain tensors: gathered where the parameters are whole."""
    if layout is None or not layout.whole or layout.shards == 1:
        return parts
    flat = tree.flatten(parts)
    flat |= zip(layout.cut, _all_gather(layout, {name: flat[name] for name in layout.cut}))
    return tree.unflatten(flat, parts)


def join_(layout: Layout | None, params: TensorDict) -> None:
    """Bring the parts of whole parameters that the other ranks have updated into `params`, in place."""
    if layout is None or not layout.whole or layout.shards == 1:
        return
    flat, under_way = tree.flatten(local(params)), []
    for name in layout.cut:
        whole, dim = flat[name], layout.dims[name] or 0
        part = _part(layout, whole, dim)
        if dim == 0:  # without a second copy
            group = layout.group("shard")
            under_way.append(_ops.all_gather_into_tensor_out(part, layout.shards, group, out=whole))
        else:
            whole.copy_(_all_gather(layout, {name: part})[0])
    for whole in under_way:
        _ops.wait_tensor(whole)


class MuonAllToAll(NamedTuple):
    """How a stack of matrices, of which every rank has a part of each, becomes whole matrices, a few on every rank.

    Muon needs whole matrices. Both directions are one all_to_all (of a stack that is cut).

    Attributes:
        ranks, rank, group: of the shard axis. dim: of a matrix that is cut. moment_dim: the same of its moment
            `second`; None: every rank has all of that.
    """

    ranks: int
    rank: int
    group: str
    dim: int
    moment_dim: int | None

    def to_whole(self, x: Tensor, dim: int | None) -> Tensor:
        """Return the whole matrices (ceil(n / ranks), …) that are this rank's, of parts (n, …); zeros fill the rest."""
        each = -(-x.shape[0] // self.ranks)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, each * self.ranks - x.shape[0]))
        if dim is None:
            return x.narrow(0, self.rank * each, each)
        x = self._swap(x).unflatten(0, (self.ranks, each))  # part of rank i, matrix, …
        return x.movedim(0, dim + 1).flatten(dim + 1, dim + 2)

    def to_parts(self, x: Tensor, dim: int | None, n: int) -> Tensor:
        """Return this rank's parts of all `n` matrices, of the whole ones that the ranks have."""
        if dim is None:
            return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), self.ranks, self.group))[:n]
        x = x.unflatten(dim + 1, (self.ranks, -1)).movedim(dim + 1, 0).flatten(0, 1)
        return self._swap(x)[:n]

    def _swap(self, x: Tensor) -> Tensor:
        sizes = [x.shape[0] // self.ranks] * self.ranks
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), sizes, sizes, self.group))


def muon_all_to_all(layout: Layout | None, name: str, second_shape: Sequence[int]) -> MuonAllToAll | None:
    """Return how matrix `name`, whose moment is of `second_shape` in all, is exchanged; None: a rank has it whole."""
    if layout is None or layout.dims[name] is None or layout.shards == 1:
        return None
    rank, dim = layout.mesh.get_local_rank("shard"), layout.dims[name] or 0
    return MuonAllToAll(layout.shards, rank, layout.group("shard"), dim, state_dim(layout, name, second_shape))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


_ops = torch.ops._c10d_functional  # the dispatcher's: the functions around them changed names between torch versions


def _all_gather(layout: Layout, flat: Mapping[str, Tensor]) -> list[Tensor]:
    dims = [layout.dims[name] or 0 for name in flat]
    rows = [x.movedim(dim, 0).contiguous() for x, dim in zip(flat.values(), dims)]
    if not rows:
        return []
    wholes = _ops.all_gather_into_tensor_coalesced(rows, layout.shards, layout.group("shard"))
    return [_ops.wait_tensor(x).movedim(0, dim) for x, dim in zip(wholes, dims)]


def _all_reduce(xs: list[Tensor], group: str) -> list[Tensor]:
    return [_ops.wait_tensor(x) for x in _ops.all_reduce_coalesced_(xs, "sum", group)] if xs else []
