"""The planner: memory against real states and a compiled step, traffic by hand, and the plan experiment."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

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
from nanochat.train import planner
from nanochat.train.planner import Setup

BF16, F32 = torch.bfloat16, torch.float32
TINY = ModelConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
D12 = model.from_depth(12)
HERE = Runtime(
    rank=0, local_rank=0, world_size=1, node_ranks=1, restarts=0, device=torch.device("cpu"), compute_dtype=BF16
)

# Memory of a step


@pytest.mark.parametrize(
    ("depth", "rows", "context", "setup", "micro_batches", "traced_mib"),
    [
        (4, 1, 512, Setup(dtype=F32), 1, 1277.0),
        (4, 64, 4096, Setup("fsdp", 8, 8, BF16, True), 4, 10092.5),
        (12, 32, 2048, Setup(), 1, 26138.5),
        (20, 8, 2048, Setup("zero2", 8, 8, BF16, True), 4, 21804.7),
        (20, 16, 4096, Setup("hsdp", 16, 8, F32, True), 1, 92701.9),
        (28, 4, 1024, Setup("replicate", 8, 8, F32, True), 1, 45933.3),
        (32, 1, 512, Setup("fsdp", 64, 64, F32), 1, 13660.0),
        (32, 64, 512, Setup(fp8=True), 4, 96584.8),
    ],
)
def test_memory_within_ten_percent_of_traced_step(
    depth: int, rows: int, context: int, setup: Setup, micro_batches: int, traced_mib: float
) -> None:
    shape = model.from_depth(depth, sequence_len=context)
    planned = planner.memory(shape, setup, rows=rows, micro_batches=micro_batches)
    assert traced_mib <= planned.total / 2**20 <= 1.1 * traced_mib


@pytest.mark.slow
def test_planned_peak_matches_compiled_step() -> None:
    shape = ModelConfig(sequence_len=128, vocab_size=512, n_layer=1, n_head=2, n_kv_head=2, n_embd=128)
    rows, setup = 4, Setup(dtype=F32)
    params = tree.map(lambda p: p.detach().requires_grad_(), model.init(shape, 0))
    batch = random_batch(shape, rows=rows)
    compute = Compute(dtype=F32, attend=attention.sdpa)
    loss_fn = torch.compile(functools.partial(loss.next_token, config=shape, compute=compute), fullgraph=True)

    def step() -> None:
        value, _ = loss_fn(params, batch)
        torch.autograd.grad(value, tree.leaves(params))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler
    events = sorted((e for e in results.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    planned = planner.phases(shape, setup, rows=rows, micro_batches=1)[:2]
    state = planned[0].parts["parameters"] + planned[0].parts["optimizer"]
    assert max(phase.allocated for phase in planned) - state == pytest.approx(peak, rel=0.1)


@pytest.fixture
def four_ranks() -> Iterator[Runtime]:
    """This process as rank 1 of 4, with collectives that do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield dataclasses.replace(HERE, rank=1, local_rank=1, world_size=4, node_ranks=4)
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", planner.MODES)
@pytest.mark.parametrize(("kv_heads", "moments"), [(4, "float32"), (1, "bfloat16")])
def test_planned_state_size_matches_real_state(mode: Any, kv_heads: int, moments: str, four_ranks: Runtime) -> None:
    shape = ModelConfig(sequence_len=16, vocab_size=100, n_layer=3, n_head=4, n_kv_head=kv_heads, n_embd=32)
    spec = model.spec(shape)
    sharding_plan = sharding.make_plan(sharding.ShardingConfig(mode=mode, shard_ranks=2), four_ranks, spec)
    state = train.init(model.init(shape, 0, dtype=BF16, sharding_plan=sharding_plan), spec, BF16, sharding_plan)
    real = sharding.local_shards(train.build.with_embedding_moments(moments, state))
    planned = planner.state_bytes(shape, Setup(mode, 4, 2, embedding_moments=getattr(torch, moments)))
    assert planned["parameters"] == tree.nbytes(real.params)
    assert planned["optimizer"] == tree.nbytes([real.step, real.opt_state, real.scaler])


@pytest.mark.parametrize("mode", ["zero2", "hsdp"])
def test_planned_state_of_adapters_is_the_base_once_and_the_adapters_like_any_parameter(
    mode: Any, four_ranks: Runtime
) -> None:
    shape, targets = (
        ModelConfig(sequence_len=16, vocab_size=100, n_layer=2, n_head=4, n_kv_head=4, n_embd=32),
        ("*.attn.[qk]", "*.fc"),
    )
    spec = model.lora.spec(shape, 4, targets)
    sharding_plan = sharding.make_plan(sharding.ShardingConfig(mode=mode, shard_ranks=2), four_ranks, spec)
    adapters = model.lora.init(shape, 0, 4, targets, sharding_plan=sharding_plan)
    base = tree.map(lambda x: x.to(BF16) if x.dim() > 1 else x, model.init(shape, 0))
    real = sharding.local_shards(train.init(adapters, spec, BF16, sharding_plan))
    setup = Setup(mode, 4, 2, lora_rank=4, lora_targets=targets)
    planned = planner.state_bytes(shape, setup)
    assert planned["parameters"] == tree.nbytes([base, real.params])
    assert planned["optimizer"] == tree.nbytes([real.step, real.opt_state, real.scaler])
    memory, whole = (planner.memory(D12, x, rows=4, micro_batches=1) for x in (setup, Setup(mode, 4, 2)))
    assert memory.parts["optimizer"] < whole.parts["optimizer"] / 50 and memory.total < 0.9 * whole.total


def test_largest_batch_fits_and_next_does_not() -> None:
    capacity, rows_per_rank = 9 * 2**30, 12
    rows = planner.largest_batch(D12, Setup(), rows_per_rank, capacity)
    assert rows is not None and rows_per_rank % rows == 0
    larger = next(n for n in range(rows + 1, rows_per_rank + 1) if rows_per_rank % n == 0)
    for n, expected in ((rows, True), (larger, False)):
        needed = planner.memory(D12, Setup(), rows=n, micro_batches=rows_per_rank // n)
        assert planner.fits(needed, capacity) == expected
    assert planner.largest_batch(D12, Setup(), rows_per_rank, 2 * 2**30) is None


# Communication. Sharded: three embeddings of 64 x 32, four matrices of 32 x 32, one of 128 x 32, one of 32 x 128.
EMBEDDINGS, MATRICES, SMALL = 3 * 2048, 4 * 1024 + 2 * 4096, 52


def test_traffic_matches_hand_calculation() -> None:
    assert set(planner.traffic(TINY, Setup("fsdp"), micro_batches=3).values()) == {0.0}
    small = 2 * 0.75 * 4 * SMALL
    traffic = planner.traffic(TINY, Setup("replicate", 4, 4), micro_batches=2)
    everything = 2 * 0.75 * 4 * (EMBEDDINGS + MATRICES + SMALL)
    assert traffic == {"all_gather": 0, "reduce_scatter": 0, "all_reduce": everything, "all_to_all": 0}

    # Stacks are padded to 4, 4 and 4 matrices, of which a rank has a quarter; second moments are a row or a column.
    muon = 0.75 * ((2 + 2) * (1024 + 4096 + 4096) + (4 + 4) * (32 + 128 + 128))
    assert planner.traffic(TINY, Setup("zero2", 4, 4), micro_batches=2) == {
        "all_gather": 0.75 * (2 * 2 * 2048 + 4 * (2048 + MATRICES)),  # wte and value_embed are bfloat16
        "reduce_scatter": 0.75 * 4 * (EMBEDDINGS + MATRICES),
        "all_reduce": small,
        "all_to_all": muon,
    }
    assert planner.traffic(TINY, Setup("fsdp", 4, 4), micro_batches=2) == {
        "all_gather": 2 * 0.75 * 2 * (EMBEDDINGS + 2 * MATRICES),
        "reduce_scatter": 2 * 0.75 * 4 * (EMBEDDINGS + MATRICES),
        "all_reduce": small,
        "all_to_all": muon,
    }
    assert planner.traffic(TINY, Setup("hsdp", 4, 2), micro_batches=2) == {
        "all_gather": 2 * 0.5 * 2 * (EMBEDDINGS + 2 * MATRICES),
        "reduce_scatter": 2 * 0.5 * 4 * (EMBEDDINGS + MATRICES),
        "all_reduce": 2 * 0.5 * 4 * (EMBEDDINGS + MATRICES) / 2 + small,
        "all_to_all": 0.5 * ((2 + 2) * (2048 + 4096 + 4096) + (4 + 4) * (64 + 128 + 128)),
    }


# Time and cost


def test_time_and_cost_follow_from_flops_and_bytes() -> None:
    shape, plan = pretrain.resolve(pretrain.Config(depth=12), None)
    gpu = hardware.GPU_SPECS["h100"]
    estimate = planner.estimate(shape, plan, gpu, Setup(), mfu=0.25, rows=4)
    assert estimate is not None
    assert estimate.exposed_seconds == 0
    assert estimate.compute_seconds == pytest.approx(plan.flops_per_token * plan.total_batch_size / (0.25 * 989e12))
    assert estimate.hours == pytest.approx(plan.num_steps * estimate.compute_seconds / 3600)
    assert estimate.dollars == pytest.approx(estimate.hours * gpu.dollars_per_hour)
    setup = Setup("zero2", 16, 8)
    sent = planner.traffic(shape, setup, micro_batches=1)
    setups = (dataclasses.replace(setup, node_ranks=n) for n in (16, 4))
    near, far = (planner.communication_seconds(sent, setup, gpu) for setup in setups)
    assert near[0] == far[0] == 0 and far[1] > near[1]
    assert near[1] == pytest.approx(sum(sent.values()) / gpu.link_bytes_per_second)


# The experiment


def test_plan_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_cuda(*_: Any) -> None:
        raise AssertionError("the plan used CUDA")

    monkeypatch.setattr(torch.cuda, "_lazy_init", no_cuda)
    monkeypatch.setattr(experiment, "DEPTHS", (12,))
    settings = ["depth=12", "gpu=rtx3060", "total_batch_size=8192", "num_iterations=3", "model.vocab_size=4096"]
    experiment.run(override(experiment.config(), settings), HERE)
    text = capsys.readouterr().out
    shape = model.from_depth(12, vocab_size=4096)
    real = sum(x.numel() for x in tree.leaves(model.init(shape, 0, device="meta")))
    assert ["total", f"{real:,}"] in [line.split() for line in text.splitlines()]
    assert f"{model.flops_per_token(shape):,} a token" in text
    assert "3 steps, 24,576 tokens" in text
    assert "1 x rtx3070 (8 GiB)" in text and "8 x h100" in text
    last = text.splitlines()[-1]
    assert last.startswith("next: torchrun --nproc_per_node=1 launch.py --experiment=pretrain --set depth=12")
    given = [x for x in last.split() if "=" in x and not x.startswith("--")]
    resolved = override(pretrain.config(), given)
    assert (resolved.total_batch_size, resolved.num_iterations, resolved.model.vocab_size) == (8192, 3, 4096)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["gpu=h1000"], "gpu=h1000: not in GPU_SPECS .* did you mean h100"),
        (["world_size=0"], "world_size=0: must be at least 1"),
        (["world_size=7"], "total_batch_size=1048576: not a multiple"),
        (["device_batch_size=7"], "device_batch_size=7: does not divide"),
        (["world_size=8", "mode=hsdp", "shard_ranks=3"], "groups of 3 do not divide world_size=8"),
    ],
)
def test_invalid_settings_raise_one_line_error(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment.run(override(experiment.config(), settings), HERE)


def test_hsdp_is_planned_for_multiple_nodes_only() -> None:
    for world_size, modes in ((16, planner.MODES), (8, planner.MODES[:3]), (1, ("replicate",))):
        config = override(experiment.config(), [f"world_size={world_size}"])
        assert tuple(experiment.sharding_modes(config)) == modes
