"""AdamW's moments of the embedding tables in bfloat16: the update, over ranks, resumed, switched on and off."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import sharded_steps
import tiny_run
import torch

from nanochat import checkpoint, distributed, model, optim, train, tree
from nanochat.distributed import sharding
from nanochat.train import build

BF16, NAME = torch.bfloat16, "opt_state.embedding.v.wte"


def test_update_computes_in_float32_and_rounds_what_it_stores():
    generator = torch.Generator().manual_seed(0)
    p, g, m, v = (torch.randn(64, 8, generator=generator) for _ in range(4))
    m, v, step, h = m.to(BF16), v.abs().to(BF16), torch.tensor(3), sharded_steps.hparams(1)["embedding"]
    want = optim.muon_adamw.adamw(p, g, m.float(), v.float(), step, h)
    for rule in (optim.muon_adamw.adamw, optim.muon_adamw.adamw_):
        got = rule(p.clone(), g, m.clone(), v.clone(), step, h, None, torch.tensor(False))
        torch.testing.assert_close(got, (want[0], want[1].to(BF16), want[2].to(BF16)), rtol=0, atol=0)


def state_after(plan: Any, micro_batches: list[torch.Tensor]) -> tuple[Any, int]:
    state, step = sharded_steps.start(plan)
    state = build.with_embedding_moments("bfloat16", state)
    for number in range(2):
        state, _ = step(state, [sharded_steps.batch(rows) for rows in micro_batches], sharded_steps.hparams(number))
    local = sharding.local_shards(state.opt_state["embedding"])
    assert {x.dtype for x in tree.leaves(local)} == {BF16}
    return sharded_steps.full(state.params), tree.nbytes(local)


def run_ranks() -> tuple[float, float]:
    with distributed.distributed_context("cpu") as runtime:
        rows = list(sharded_steps.data()[0])
        parts = [part[r :: runtime.world_size] for part in rows for r in range(runtime.world_size)]
        alone, whole = state_after(None, parts)
        plan = sharding.make_plan(sharded_steps.MODES["zero2"], runtime, model.spec(sharded_steps.CONFIG))
        got, local = state_after(plan, [part[runtime.rank :: runtime.world_size] for part in rows])
        return sharded_steps.difference(got, alone), local / whole


@pytest.mark.slow
def test_ranks_keep_shards_of_them():
    for difference, share in ranks.call(2, run_ranks):
        assert difference < 1e-4 and share < 0.55


def saved_dtype(folder: Path) -> str:
    return checkpoint.inspect(folder).state[NAME]["dtype"]


@pytest.mark.slow
def test_run_resumes_exactly_and_the_setting_can_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    setting = "train.embedding_moments=bfloat16"
    with tiny_run.base_folder(tmp_path):
        whole = tiny_run.pretrain_run(setting, "name=whole")
        with tiny_run.stop_after(3):
            tiny_run.pretrain_run(setting, "name=stopped")
        stopped = tiny_run.pretrain_run(setting, "name=stopped", "resume=true")
        tiny_run.assert_same_run(whole, stopped)
        assert saved_dtype(stopped) == "bfloat16"
        exact = checkpoint.load_params(tiny_run.pretrain_run("name=exact") / "checkpoints")[0]
        rounded = checkpoint.load_params(whole / "checkpoints")[0]
        assert tiny_run.losses(whole) == pytest.approx(tiny_run.losses(train.run_folder("exact")), rel=0.01)
        assert any((a != b).any() for a, b in zip(tree.leaves(rounded), tree.leaves(exact)))
        for settings, dtype in ((("num_iterations=7",), "float32"), ((setting, "num_iterations=8"), "bfloat16")):
            assert saved_dtype(tiny_run.pretrain_run("name=stopped", "resume=true", *settings)) == dtype
        assert "train.embedding_moments = bfloat16 (was float32)" in capsys.readouterr().out
