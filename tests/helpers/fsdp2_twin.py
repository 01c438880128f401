"""What the ranks of test_fsdp2.py run: our fsdp mode beside an nn.Module under torch's fully_shard."""

import functools
from pathlib import Path
from typing import Any

import small_model
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nanochat import checkpoint, distributed, model, optim, train, tree
from nanochat.distributed import Runtime, ShardingConfig, sharding
from nanochat.model import ModelConfig, loss

CONFIG = ModelConfig(sequence_len=16, vocab_size=100, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
STEPS = 5


class Twin(nn.Module):
    """The model as a module: parameters of the same names, created, moved and hooked as PyTorch does it."""

    def __init__(self, flat: dict[str, Tensor]) -> None:
        super().__init__()
        for name, x in flat.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = getattr(node, part)
            node.register_parameter(leaf, nn.Parameter(x.clone()))

    def shards(self) -> dict[str, Any]:
        """Return the parameters, which fully_shard has made DTensors."""
        return dict(self.named_parameters())

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return loss.next_token(tree.nest(self.shards()), batch, config=CONFIG)[0]


def hparams() -> optim.Hparams:
    return optim.as_hparams(optim.param_group_settings(optim.OptimConfig(), CONFIG.n_embd, batch_scale=0.1))


def batches(runtime: Runtime) -> list[dict[str, Tensor]]:
    whole = [small_model.random_batch(CONFIG, rows=4) for _ in range(STEPS)]
    for batch in whole:
        batch["targets"] = batch["targets"].clamp_min(0)  # the mean of the ranks' means is that of the whole batch
    return [{name: x[runtime.rank :: runtime.world_size] for name, x in batch.items()} for batch in whole]


def train_ours(runtime: Runtime) -> tuple[train.TrainState, list[float]]:
    plan = sharding.make_plan(ShardingConfig("fsdp"), runtime, model.spec(CONFIG))
    flat = tree.flatten(small_model.random_params(CONFIG))
    params = tree.unflatten({name: sharding.place(plan, name, x) for name, x in flat.items()})
    compute = model.Compute(all_gather=sharding.gather_layer(plan, torch.float32))
    loss_fn = functools.partial(loss.next_token, config=CONFIG, compute=compute)
    gather = functools.partial(sharding.gather, plan, dtype=torch.float32)
    update = train.make_update(donate=True, sharding_plan=plan)
    state, losses = train.init(params, model.spec(CONFIG), torch.float32, plan), []
    for batch in batches(runtime):
        value_and_grad = train.gradient(loss_fn)
        state, metrics = train.train_step(
            state, [batch], hparams(), value_and_grad=value_and_grad, update=update, gather=gather
        )
        losses.append(float(metrics["loss"]))
    return state, losses


def train_twin(runtime: Runtime, mesh: Any) -> tuple[Twin, list[float]]:
    twin = Twin(tree.flatten(small_model.random_params(CONFIG)))
    fully_shard(twin, mesh=mesh)
    opt_state, losses = optim.init(full(twin), model.spec(CONFIG)), []
    for batch in batches(runtime):
        value = twin(batch)
        value.backward()
        losses.append(distributed.all_reduce_sum([float(value)])[0] / runtime.world_size)
        grads = tree.unflatten({name: x.grad.full_tensor() for name, x in twin.shards().items()})
        params, opt_state = optim.update(grads, opt_state, full(twin), hparams())
        with torch.no_grad():
            for name, x in twin.shards().items():
                value = params[tuple(name.split("."))]
                x.to_local().copy_(distribute_like(x, value).to_local())
        twin.zero_grad()
    return twin, losses


def distribute_like(x: Any, value: Tensor) -> DTensor:
    replicated = DTensor.from_local(value, x.device_mesh, run_check=False)
    return replicated.redistribute(placements=x.placements)


def even(x: Any) -> Tensor:
    """Return a parameter as checkpoints take it: what does not divide is full on every rank."""
    return x if x.shape[0] % x.device_mesh.size() == 0 else x.full_tensor()


def full(twin: Twin) -> Any:
    with torch.no_grad():
        return tree.unflatten({name: x.full_tensor() for name, x in twin.shards().items()})


def compare(folder: Path) -> dict[str, Any]:
    """Return both runs' losses and placements; the module's checkpoint is read as the parameters of the function."""
    with distributed.distributed_context("cpu") as runtime:
        state, losses = train_ours(runtime)
        mesh = next(iter(tree.leaves(state.params))).device_mesh
        twin, twin_losses = train_twin(runtime, mesh)
        shards = tree.unflatten({name: even(x.detach()) for name, x in twin.shards().items()})
        manager = checkpoint.open_manager(folder)
        checkpoint.save(manager, state._replace(params=shards), {})
        checkpoint.close(manager)
        read = sharding.full_params(checkpoint.restore(folder, state)[0].params)
        small_model.assert_trees_close(read, full(twin), rtol=0)
        small_model.assert_trees_close(read, sharding.full_params(state.params), rtol=1e-3)
        ours: Any = tree.flatten(state.params)
        return {
            "losses": (losses, twin_losses),
            "placements": {
                name: (str(mine.placements), str(theirs.placements))
                for (name, mine), theirs in zip(ours.items(), twin.shards().values())
            },
        }
