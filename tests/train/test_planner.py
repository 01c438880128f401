"""The planner: exact counts, memory against real states and compiled steps, traffic by hand, and its experiment."""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_model import random_batch

from experiments import plan as experiment
from experiments import pretrain
from nanochat import model, train, tree
from nanochat.config import UserError, override
from nanochat.distributed import Runtime, hardware, sharding
from nanochat.model import Compute, ModelConfig, attention, loss
from nanochat.train import BufferLifetimes, activation_memory, planner

BF16 = torch.bfloat16
TINY = ModelConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
D12 = model.from_depth(12)
ALONE: dict[str, Any] = {"mode": "replicate", "world_size": 1, "shard_ranks": 1, "dtype": BF16}
HERE = Runtime(
    rank=0, local_rank=0, world_size=1, node_ranks=1, restarts=0, device=torch.device("cpu"), compute_dtype=BF16
)


def held(timeline: BufferLifetimes, roles: tuple[str, ...] = ("saved", "temporary", "result")) -> list[int]:
    """Return the bytes held at every step."""
    live = [0] * (timeline.steps + 1)
    for b in timeline.buffers:
        if b.role in roles:
            live[b.first] += b.itemsize * math.prod(b.sizes)
            live[b.last + 1] -= b.itemsize * math.prod(b.sizes)
    return [sum(live[: i + 1]) for i in range(timeline.steps)]


# Buffers of a function


def test_a_chain_of_pointwise_operations_has_no_buffers_inside() -> None:
    with activation_memory.fake_mode():
        x, w = torch.empty(64, 32), torch.empty(32, 8)
        found = activation_memory.inference(lambda x, w: ((x.exp() + 1).sin() @ w).tanh(), [x, w])
    # The product's left side, then the product, which tanh overwrites.
    assert max(held(found)) == 4 * (64 * 32 + 64 * 8)
    assert [b.sizes for b in found.buffers if b.role == "result"] == [(64, 8)]


def test_what_a_backward_needs_is_saved() -> None:
    with activation_memory.fake_mode():
        x, w = torch.empty(64, 32), torch.empty(32, 8, requires_grad=True)
        found = activation_memory.training(lambda x, w: (x @ w).square().sum(), [x, w])
    saved = [b for b in found.buffers if b.role == "saved"]
    assert sorted(b.sizes for b in saved) == [(), (64, 8)]  # the loss, and x @ w
    product = next(b for b in saved if b.sizes)
    assert product.first < found.forward_steps <= product.last
    assert [b.sizes for b in found.buffers if b.role == "result"] == [(32, 8)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, int]:
    """Bytes that a small compiled loss saves for its backward and that a step holds at most, as torch counts them."""
    shape = ModelConfig(sequence_len=128, vocab_size=512, n_layer=1, n_head=2, n_kv_head=2, n_embd=128)
    rows, chunk_tokens = 4, 256
    params = tree.map(lambda p: p.detach().requires_grad_(), model.init(shape, 0))
    batch = random_batch(shape, rows=rows)
    compute = Compute(dtype=torch.float32, attend=attention.sdpa)
    loss_fn = torch.compile(
        functools.partial(loss.next_token, config=shape, compute=compute, chunk_tokens=chunk_tokens), fullgraph=True
    )
    own = {x.untyped_storage().data_ptr() for x in [*tree.leaves(params), *batch.values()]}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value, _ = loss_fn(params, batch)
        torch.autograd.grad(value, tree.leaves(params))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        value, _ = loss_fn(params, batch)
        grads = torch.autograd.grad(value, tree.leaves(params))
    del grads
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    timeline = activation_memory.trace_loss(
        shape, rows, torch.float32, fp8=False, chunk_tokens=chunk_tokens, gathered=False
    )
    planned = sum(b.itemsize * math.prod(b.sizes) for b in timeline.buffers if b.role == "saved")
    return {"saved": sum(saved.values()), "peak": peak, "planned saved": planned, "planned peak": max(held(timeline))}


def test_saved_bytes_are_those_of_the_compiled_loss(compiled: dict[str, int]) -> None:
    # Of a single layer; of four they differ by 2 KB in 164 MB.
    assert compiled["planned saved"] == pytest.approx(compiled["saved"], rel=0.06)


def test_the_peak_is_that_of_a_compiled_step(compiled: dict[str, int]) -> None:
    assert compiled["planned peak"] == pytest.approx(compiled["peak"], rel=0.1)


# Memory of a step


def test_depth_is_continued_as_a_trace_of_that_depth_finds_it() -> None:
    shape = dataclasses.replace(D12, n_layer=8)
    curves, middle = activation_memory.curves(shape, 4, BF16, False, 8192, 1, False)
    planned = np.sum(list(curves.values()), axis=0)
    timeline = activation_memory.trace_loss(shape, 4, BF16, fp8=False, chunk_tokens=8192, gathered=False)
    direct, forward = held(timeline), timeline.forward_steps
    assert planned[:middle].max() == pytest.approx(max(direct[:forward]), rel=1e-3)
    assert planned[middle:].max() == pytest.approx(max(direct[forward:]), rel=1e-3)


def test_memory_grows_with_rows_and_by_the_same_for_each() -> None:
    sizes = [planner.memory(D12, rows=n, micro_batches=1, **ALONE) for n in (1, 2, 3, 4)]
    totals = [m.total for m in sizes]
    assert totals == sorted(totals)
    found = [planner.moments(D12, rows=n, micro_batches=1, **ALONE)[0].activations for n in (2, 3, 4)]
    assert found[1] - found[0] == pytest.approx(found[2] - found[1], abs=8)


def test_parts_add_up() -> None:
    found = planner.memory(D12, rows=2, micro_batches=4, **ALONE)
    assert found.total == sum(found.parts.values()) == found.allocated + found.overhead
    assert found.moment in ("forward", "backward", "reduce", "update")
    assert all(value >= 0 for value in found.parts.values())
    assert found.gradients >= 4 * model.count(D12)["total"]  # the sums over micro-batches


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """This process as rank 1 of 4, with collectives that do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # init_process_group replaces it
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield dataclasses.replace(HERE, rank=1, local_rank=1, world_size=4, node_ranks=4)
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", planner.MODES)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_state_is_as_large_as_a_real_one(mode: Any, kv_heads: int, four_ranks: Runtime) -> None:
    shape = ModelConfig(sequence_len=16, vocab_size=100, n_layer=3, n_head=4, n_kv_head=kv_heads, n_embd=32)
    spec, shards = model.spec(shape), planner.ranks_per_copy(mode, 4, 2)
    layout = sharding.make_layout(sharding.ShardingConfig(mode=mode, shard_ranks=2), four_ranks, spec)
    real = sharding.local(train.init(model.init(shape, 0, dtype=BF16, layout=layout), spec, BF16, layout))
    planned = planner.state(shape, mode=mode, shards=shards, dtype=BF16)
    assert planned.parameters == tree.nbytes(real.params)
    assert planned.optimizer == tree.nbytes([real.step, real.opt_state, real.scaler])


def test_a_state_of_one_process_is_as_large_as_a_real_one() -> None:
    real = train.init(model.init(TINY, 0), model.spec(TINY))
    planned = planner.state(TINY, mode="replicate", shards=1, dtype=torch.float32)
    assert planned.parameters + planned.optimizer == tree.nbytes(tuple(real))
    assert planned.whole_f32 == planned.parts_f32 == planned.whole_made == tree.nbytes(real.params)


def test_the_largest_batch_divides_and_fits_and_the_next_does_not() -> None:
    capacity, rows_per_rank = 9 * 2**30, 12
    rows = planner.largest_batch(D12, rows_per_rank, capacity, **ALONE)
    assert rows is not None and rows_per_rank % rows == 0
    room = capacity * (1 - planner.RESERVE)
    larger = next(n for n in range(rows + 1, rows_per_rank + 1) if rows_per_rank % n == 0)
    for n, fits in ((rows, True), (larger, False)):
        needed = planner.memory(D12, rows=n, micro_batches=rows_per_rank // n, **ALONE)
        assert (needed.total <= room) == fits
    assert planner.largest_batch(D12, rows_per_rank, 2 * 2**30, **ALONE) is None


# The wire. Cut: three tables of 64 x 32, four matrices of 32 x 32, one of 128 x 32, one of 32 x 128; 52 small numbers.
TABLES, MATRICES, SMALL = 3 * 2048, 4 * 1024 + 2 * 4096, 52


def test_traffic_by_hand() -> None:
    how: dict[str, Any] = {"micro_batches": 2, "world_size": 4, "dtype": BF16}
    small = 2 * 0.75 * 4 * SMALL
    found = planner.traffic(TINY, mode="replicate", shard_ranks=4, **how)
    everything = 2 * 0.75 * 4 * (TABLES + MATRICES + SMALL)
    assert found == {"all_gather": 0, "reduce_scatter": 0, "all_reduce": everything, "all_to_all": 0}

    # Stacks are filled up to 4, 4 and 4 matrices, of which a rank has a quarter; `second` is a row or a column each.
    muon = 0.75 * ((2 + 4) * (1024 + 4096 + 4096) + (4 + 4) * (32 + 128 + 128))
    found = planner.traffic(TINY, mode="zero2", shard_ranks=4, **how)
    assert found == {
        "all_gather": 0.75 * (2 * 2 * 2048 + 4 * (2048 + MATRICES)),  # wte and value_embed are bfloat16
        "reduce_scatter": 0.75 * 4 * (TABLES + MATRICES),
        "all_reduce": small,
        "all_to_all": muon,
    }
    found = planner.traffic(TINY, mode="fsdp", shard_ranks=4, **how)
    assert found == {
        "all_gather": 2 * 0.75 * 2 * (TABLES + 2 * MATRICES),
        "reduce_scatter": 2 * 0.75 * 4 * (TABLES + MATRICES),
        "all_reduce": small,
        "all_to_all": muon,
    }
    found = planner.traffic(TINY, mode="hsdp", shard_ranks=2, **how)
    assert found == {
        "all_gather": 2 * 0.5 * 2 * (TABLES + 2 * MATRICES),
        "reduce_scatter": 2 * 0.5 * 4 * (TABLES + MATRICES),
        "all_reduce": 2 * 0.5 * 4 * (TABLES + MATRICES) / 2 + small,
        "all_to_all": 0.5 * ((2 + 4) * (2048 + 4096 + 4096) + (4 + 4) * (64 + 128 + 128)),
    }


def test_nothing_is_sent_by_a_process_alone() -> None:
    for mode in planner.MODES:
        found = planner.traffic(TINY, micro_batches=3, mode=mode, world_size=1, shard_ranks=1, dtype=BF16)
        assert set(found.values()) == {0.0}


@pytest.mark.parametrize(("mode", "shard_ranks"), [("zero3", 1), ("hsdp", 3), ("hsdp", 0)])
def test_impossible_modes_are_refused(mode: str, shard_ranks: int) -> None:
    with pytest.raises(ValueError, match=r"zero3: expected|must divide the 4 ranks"):
        planner.ranks_per_copy(mode, 4, shard_ranks)


# Time and cost


def test_time_follows_from_flops_and_bytes() -> None:
    shape, plan = pretrain.resolve(dataclasses.replace(pretrain.config(), depth=12), None)
    machine = hardware.GPU_SPECS["h100"]
    how: dict[str, Any] = {"world_size": 1, "node_ranks": 8, "shard_ranks": 1, "dtype": BF16, "mfu": 0.25}
    one = planner.estimate(shape, plan, machine, mode="replicate", rows=4, **how)
    assert one is not None
    assert one.exposed_seconds == 0
    assert one.compute_seconds == pytest.approx(plan.flops_per_token * plan.total_batch_size / (0.25 * 989e12))
    assert one.hours == pytest.approx(plan.num_steps * one.compute_seconds / 3600)
    assert one.dollars == pytest.approx(one.hours * machine.dollars_per_hour)
    sent = planner.traffic(shape, micro_batches=1, mode="zero2", world_size=16, shard_ranks=8, dtype=BF16)
    near, far = (
        planner.wire_seconds(sent, machine, mode="zero2", world_size=16, node_ranks=n, shards=16) for n in (16, 4)
    )
    assert near[0] == far[0] == 0 and far[1] > near[1]
    assert near[1] == pytest.approx(sum(sent.values()) / machine.link_bytes_per_second)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
    ],
)
def test_machines_are_known_by_what_cuda_calls_them(device: str, name: str | None) -> None:
    assert hardware.gpu_spec(device) == (hardware.GPU_SPECS[name] if name else None)


# The experiment


def test_plan_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_cuda(*_: Any) -> None:
        raise AssertionError("the plan asked for CUDA")

    monkeypatch.setattr(torch.cuda, "_lazy_init", no_cuda)
    monkeypatch.setattr(experiment, "DEPTHS", (12,))
    settings = ["depth=12", "gpu=rtx3060", "total_batch_size=8192", "num_iterations=3", "model.vocab_size=4096"]
    experiment.run(override(experiment.config(), settings), HERE)
    text = capsys.readouterr().out
    shape = model.from_depth(12, vocab_size=4096)
    real = sum(x.numel() for x in tree.leaves(model.init(shape, 0, device="meta")))
    assert f"{'total':<18}{real:>16,}" in text
    assert f"{model.flops_per_token(shape):,} a token" in text
    assert "3 steps, 24,576 tokens" in text
    assert "1 x rtx3070 (8 GiB)" in text and "8 x h100" in text
    last = text.splitlines()[-1]
    assert last.startswith("next: torchrun --nproc_per_node=1 launch.py --experiment=pretrain --set depth=12")
    # The command's settings are pretrain's own.
    given = [word for word in last.split() if "=" in word and not word.startswith("--")]
    resolved = override(pretrain.config(), given)
    assert (resolved.total_batch_size, resolved.num_iterations, resolved.model.vocab_size) == (8192, 3, 4096)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["gpu=h1000"], "gpu=h1000: not in the table .* did you mean h100"),
        (["world_size=0"], "world_size=0: must be more than 0"),
        (["world_size=7"], "total_batch_size=1048576: not a multiple"),
        (["device_batch_size=7"], "device_batch_size=7: does not divide"),
        (["world_size=8", "mode=hsdp", "shard_ranks=3"], "groups of 3 do not divide world_size=8"),
    ],
)
def test_mistakes_are_said_in_a_line(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment.run(override(experiment.config(), settings), HERE)


def test_modes_of_several_nodes() -> None:
    config = override(experiment.config(), ["world_size=16"])
    assert tuple(experiment.modes_of(config)) == planner.MODES
    assert tuple(experiment.modes_of(override(config, ["world_size=8"]))) == planner.MODES[:3]
    assert tuple(experiment.modes_of(experiment.config())) == ("replicate",)
