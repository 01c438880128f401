"""Our fsdp mode beside FSDP2 (`fully_shard`): the same losses, the same DTensors, the same checkpoints."""

from pathlib import Path

import fsdp2_twin
import pytest
import ranks


@pytest.mark.slow
def test_fsdp_mode_equals_fully_shard(tmp_path: Path):
    result = ranks.call(2, fsdp2_twin.compare, tmp_path)[0]
    ours, theirs = result["losses"]
    assert len(ours) == fsdp2_twin.STEPS and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, abs=1e-5)
    split = {name: placements for name, placements in result["placements"].items() if "Shard" in placements[0]}
    assert len(split) >= 15
    assert all(mine == other for mine, other in split.values()), split
