"""Sharded training: every mode gives what a single process gives, in a share of the memory, by as many collectives."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import sharded_steps
import torch
import torch.distributed as dist
from sharded_steps import CONFIG
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat import model, optim, train, tree
from nanochat.config import UserError
from nanochat.distributed import Runtime, ShardingConfig, mesh_shape, shard_dim, sharding
from nanochat.model import ModelConfig

Results = dict[str, Any]  # of rank 0, by case


@pytest.fixture(scope="module")
def two_ranks() -> Results:
    """All cases of two ranks, by one job: its start takes as long as they do."""
    return ranks.call(2, sharded_steps.run, "modes", "nonfinite", "compiled", "torch_func", "derivatives")[0]


def check_modes(rows: list[dict[str, Any]], number: int) -> None:
    for row in rows:
        assert row["losses"] < 1e-5 and row["norms"] < 1e-5, row
        assert row["params"] < 1e-4 and row["moments"] < 1e-4, row
        assert row["agree"], row
        check_memory(row, number)
        check_collectives(row)


@pytest.mark.slow
def test_every_mode_on_two_ranks_equals_a_single_process(two_ranks: Results) -> None:
    rows = two_ranks["modes"]
    assert [row["mode"].split(",")[0] for row in rows] == ["replicate", "zero2", "fsdp", "fsdp"]
    check_modes(rows, 2)


@pytest.mark.slow
def test_every_mode_on_four_ranks_equals_a_single_process() -> None:
    rows = ranks.call(4, sharded_steps.run, "modes")[0]["modes"]
    assert [row["mode"].split(",")[0] for row in rows] == ["replicate", "zero2", "fsdp", "fsdp", "hsdp", "hsdp"]
    check_modes(rows, 4)


@pytest.mark.slow
def test_compiled_step_equals_an_uncompiled_one(two_ranks: Results) -> None:
    assert two_ranks["compiled"]["loss"] < 1e-5 and two_ranks["compiled"]["params"] < 1e-4


@pytest.mark.slow
def test_torch_func_trains_like_autograd_on_two_ranks(two_ranks: Results) -> None:
    assert len(two_ranks["torch_func"]) == 3
    assert max(two_ranks["torch_func"].values()) < 1e-6, two_ranks["torch_func"]


@pytest.mark.slow
def test_training_where_no_dimension_divides() -> None:
    rows = ranks.call(3, sharded_steps.run, "few_steps")[0]["few_steps"]  # no dimension is a multiple of 3
    assert len(rows) == 4
    for row in rows:
        assert row["cut"] == 0 and row["share"] == 1 and row["counts"] == {"all_reduce_coalesced": 2}, row
        assert row["losses"] < 1e-5 and row["params"] < 1e-4 and row["agree"], row


def check_memory(row: dict[str, Any], number: int) -> None:
    """The share of parameters and moments that a rank holds."""
    mode = row["mode"].split(",")[0]
    if mode == "replicate":
        assert row["share"] == 1
    elif mode == "zero2":  # full parameters, and nearly two moments for each shard
        assert 1 / number < row["share"] < 1 / number + 0.5
    else:
        parts = number if mode == "fsdp" else 2
        assert row["share"] == pytest.approx(1 / parts, rel=0.02)


def check_collectives(row: dict[str, Any]) -> None:
    """A step of two micro-batches: every one of these calls is one collective, or one for a list of tensors."""
    cut, counts = row["cut"], row["counts"]
    exchanges = 4 * 4  # four shapes of matrices; they and their second moments, there and back
    if row["mode"] == "replicate":
        assert cut == 0 and counts == {"all_reduce_coalesced": 2}  # gradients; loss and norm
        return
    wanted = {"all_reduce_coalesced": 2, "all_to_all_single": exchanges}
    if row["mode"].startswith("hsdp"):
        wanted["all_reduce_coalesced"] += 1  # over the replicas
    if row["mode"] == "zero2":
        wanted |= {"reduce_scatter_tensor_coalesced": 1, "all_gather_into_tensor_out": cut}
        order, sent = row["order"], "all_gather_into_tensor_out"
        before_muon, waits = order[: order.index("baddbmm")], order[len(order) - order[::-1].index(sent) :]
        assert before_muon.count(sent) == 4, "of the tables, while Muon computes: wte, lm_head, two value embeddings"
        assert waits.count("wait_tensor") >= cut, "all are waited for after the last has started"
    elif row["mode"].endswith("once a step"):
        wanted |= {"reduce_scatter_tensor_coalesced": 1, "all_gather_into_tensor_coalesced": 1}
    else:
        gathers = 2 * (2 + 4 + 2)  # of each micro-batch: wte, lm_head, four layers, two value embeddings
        wanted |= {"reduce_scatter_tensor": gathers, "all_gather_into_tensor": gathers}
    assert counts == wanted, row["mode"]


@pytest.mark.slow
def test_gradients_through_a_gather(two_ranks: Results) -> None:
    slopes = two_ranks["derivatives"]
    assert slopes["eager"] == pytest.approx(slopes["difference"], rel=1e-7)
    assert slopes["compiled"] == pytest.approx(slopes["eager"], rel=1e-12)


@pytest.mark.slow
def test_a_nonfinite_gradient_on_one_rank_skips_the_step_on_all(two_ranks: Results) -> None:
    assert len(two_ranks["nonfinite"]) == 3
    for row in two_ranks["nonfinite"]:
        assert row == {"mode": row["mode"], "finite": False, "same": True}


def test_shard_dim() -> None:
    assert shard_dim((64, 32), ("hidden", "embed"), 4) == 0
    assert shard_dim((6, 32), ("heads", "embed"), 4) == 1  # the rows do not divide
    assert shard_dim((6, 9), ("heads", "embed"), 4) is None
    assert shard_dim((64, 12), ("kv_heads_count", "gate"), 4) is None  # too small to be worth it
    assert shard_dim((64, 32), ("hidden", "embed"), 1) is None


def test_mesh_shape() -> None:
    assert mesh_shape(ShardingConfig("replicate"), 8, 4) == (8, 1)
    assert mesh_shape(ShardingConfig("zero2"), 8, 4) == mesh_shape(ShardingConfig("fsdp"), 8, 4) == (1, 8)
    assert mesh_shape(ShardingConfig("hsdp"), 8, 4) == (2, 4)  # a node's ranks share one copy
    assert mesh_shape(ShardingConfig("hsdp", shard_ranks=2), 8, 4) == (4, 2)
    with pytest.raises(UserError, match=r"sharding\.shard_ranks=3: must divide the 8 ranks"):
        mesh_shape(ShardingConfig("hsdp", shard_ranks=3), 8, 4)


@pytest.fixture
def three_ranks() -> Iterator[Runtime]:
    """The first of three ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield Runtime(0, 0, 3, 3, 0, torch.device("cpu"), torch.float32)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_muon_sends_momenta_and_updates_in_the_dtype_of_the_orthogonalization(
    dtype: torch.dtype | None, three_ranks: Runtime
) -> None:
    sharding_plan = sharding.make_plan(ShardingConfig("fsdp"), three_ranks, model.spec(CONFIG))
    assert sharding_plan is not None
    exchange = sharding.MuonAllToAll(3, 0, sharding_plan.group("shard"), 0, None)
    p, second_moment = torch.zeros(6, 4, 9), torch.zeros(6, 12, 1)
    with sharded_steps.Counter() as counter:
        new_p, *_ = optim.muon_adamw.muon(
            p, p, p, second_moment, sharded_steps.hparams(0)["matrix"], None, None, dtype, exchange
        )
    assert new_p.dtype == torch.float32 and new_p.shape == p.shape
    assert counter.sent["all_to_all_single"] == [p.numel() * (4 if dtype is None else 2)] * 2, "there and back"


def test_parameters_that_do_not_divide_stay_full_with_one_warning(
    three_ranks: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    sharding_plan = sharding.make_plan(ShardingConfig("fsdp"), three_ranks, model.spec(CONFIG))
    assert sharding_plan is not None and not sharding_plan.sharded  # 64, 128 and 256 are no multiples of 3
    printed = capsys.readouterr().out
    assert re.fullmatch(r"sharding: wte \(256, 64\) and \d+ more do not divide by 3: full on every rank\n", printed)


def test_state_is_allocated_as_shards(three_ranks: Runtime) -> None:
    config = ModelConfig(sequence_len=32, vocab_size=192, n_layer=2, n_head=6, n_kv_head=6, n_embd=96)
    sharding_plan = sharding.make_plan(ShardingConfig("fsdp"), three_ranks, model.spec(config))
    params = model.init(config, 0, sharding_plan=sharding_plan)
    state = train.init(params, model.spec(config), sharding_plan=sharding_plan)
    whole = train.init(model.init(config, 0), model.spec(config))
    for got, want in ((state.params, whole.params), (state.opt_state, whole.opt_state)):
        assert tree.nbytes(sharding.local_shards(got)) == pytest.approx(tree.nbytes(want) / 3, rel=0.02)
        assert [(x.shape, x.dtype) for x in tree.leaves(got)] == [(x.shape, x.dtype) for x in tree.leaves(want)]


def test_a_single_process_has_no_plan() -> None:
    here = Runtime(0, 0, 1, 1, 0, torch.device("cpu"), torch.float32)
    assert sharding.make_plan(ShardingConfig("fsdp"), here, model.spec(CONFIG)) is None
    assert sharding.gather_layer(None, torch.float32) is None
    params = model.init(CONFIG, 0)
    assert sharding.gather(None, params, torch.float32) is params
