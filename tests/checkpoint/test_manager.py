"""Saving and restoring: bit-exact, atomic, with a retention policy, intact after failures (kills: test_sharded_*)."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks_checkpoint import State, abstract, assert_same, full_state, save_steps

from nanochat import tree
from nanochat.checkpoint import CheckpointConfig, storage
from nanochat.checkpoint import manager as checkpoint
from nanochat.config import UserError

ROOT = Path(__file__).resolve().parents[2]


def other_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.isdecimal()]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_is_restored_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    state = full_state(7)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every bfloat16, NaN payloads too
    state.params["every_bfloat16"] = patterns.view(torch.bfloat16)
    state.params["every_float16"] = patterns.view(torch.float16)
    state.params["nan"] = torch.tensor([0x7F800001, -0x3FFFFF, -(2**31)], dtype=torch.int32).view(torch.float32)
    state.params["transposed"] = torch.randn(3, 5).T
    meta = {"config": {"depth": 4, "lr": 0.1 + 0.2}, "seed": 2**63 + 1, "tuple": (1, None), "text": "λ\n"}
    arrays = {
        "loader.tokens": np.arange(10, dtype=np.uint16),
        "loader.lengths": np.array([[1], [2]], dtype=np.uint32),
        "empty": np.zeros((0, 3), dtype=np.int32),
        "scalar": np.array(2.5),
        "rng": torch.get_rng_state(),
        "fortran": np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4))),
        "bf": torch.tensor([[1.5]]).bfloat16(),
        "with/slash": np.array([-(2**62)]),
    }
    (tmp_path / "words.txt").write_bytes(b"a\x00\xff\r\n")
    manager = checkpoint.open_manager(tmp_path / "run", CheckpointConfig(asynchronous=asynchronous))
    checkpoint.save(manager, state, meta, arrays=arrays, files={"tokenizer.txt": tmp_path / "words.txt"})
    got, got_meta, got_arrays = checkpoint.restore(manager, abstract(state))
    assert_same(got, state)
    assert all(x.data_ptr() % 64 == 0 for x in tree.leaves(got)), "torch aligns memory, and products round by it"
    assert got_meta == json.loads(json.dumps(meta))
    assert list(got_arrays) == list(arrays)
    for name, want in arrays.items():
        want = storage.to_numpy(want) if isinstance(want, torch.Tensor) else want
        array = got_arrays[name]
        assert type(array) is np.ndarray and (array.shape, array.dtype) == (want.shape, want.dtype), name
        assert array.tobytes() == want.tobytes(), name
    got.params["wte"].add_(1)  # writable memory
    _, _, files = checkpoint.load_params(tmp_path / "run")
    assert files == {"tokenizer.txt": tmp_path / "run/7/files/tokenizer.txt"}
    assert files["tokenizer.txt"].read_bytes() == b"a\x00\xff\r\n"
    checkpoint.close(manager)
    again, _, _ = checkpoint.restore(tmp_path / "run", state)  # from the folder, by a concrete state
    assert_same(again, state)


LAZY = """
import os, signal, socket, sys
from pathlib import Path
from nanochat import checkpoint
checkpoint.save
assert not {"jax", "orbax.checkpoint", "tensorstore"} & set(sys.modules)
sys.path.append("tests/helpers")
from ranks_checkpoint import full_state
from nanochat.checkpoint import storage
caught = []
signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
storage.orbax()
import jax
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)  # JAX would take SIGTERM here
manager = checkpoint.open_manager(Path(sys.argv[1]))
assert "JAX_PLATFORMS" not in os.environ and jax.config.jax_platforms == "cpu"
assert not jax.config.jax_enable_x64
checkpoint.save(manager, full_state(1), {})
checkpoint.save(manager, full_state(2), {}, metrics={"val/bpb": 1.0})
checkpoint.restore(manager, full_state(1))
os.kill(os.getpid(), signal.SIGTERM)
assert caught == [signal.SIGTERM]
checkpoint.close(manager)
checkpoint.load_params(sys.argv[1])
"""


@pytest.mark.slow
def test_import_is_lazy_and_quiet_and_leaves_sigterm_to_the_program(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", LAZY, str(tmp_path)]
    done = subprocess.run(command, text=True, cwd=ROOT, stderr=subprocess.PIPE, timeout=300, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_newest_or_given_step_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.restore(tmp_path / "nowhere", full_state(0))
    manager = save_steps(tmp_path, 0, 9, 10)
    assert checkpoint.steps(manager) == checkpoint.steps(tmp_path) == [0, 9, 10]
    assert checkpoint.latest_step(tmp_path) == 10
    assert checkpoint.restore(manager, full_state(0), step=9)[0].step == 9
    params, meta, files = checkpoint.load_params(tmp_path, step=9)
    assert_same(full_state(9)._replace(params=params), full_state(9))
    assert meta == {"seed": 1} and files == {}
    for read in (checkpoint.load_params, lambda folder, step: checkpoint.restore(folder, full_state(0), step)):
        with pytest.raises(UserError, match=r"no checkpoint of step 5 in .*; there are steps 0, 9, 10"):
            read(tmp_path, step=5)
    checkpoint.save(manager, full_state(11), {})
    assert checkpoint.restore(manager, full_state(0))[0].step == 11  # waits for the save in the background
    checkpoint.close(manager)


def test_names_shapes_and_dtypes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint.close(save_steps(tmp_path, 1))
    shutil.rmtree(tmp_path / "1" / "state")  # reading would fail

    def message(change: Callable[[Any], Any]) -> str:
        want = full_state(1)
        change(want.params)
        with pytest.raises(UserError) as caught:
            checkpoint.restore(tmp_path, abstract(want))
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"checkpoint {tmp_path / '1'} ")

    saved = "has params.wte (64, 64) float32"
    assert message(lambda p: p.set("wte", torch.zeros(8, 50))) == f"{saved}, this model expects (8, 50) float32"
    half = torch.zeros(64, 64).bfloat16()
    assert message(lambda p: p.set("wte", half)) == f"{saved}, this model expects (64, 64) bfloat16"
    assert message(lambda p: p.set("new", half)) == "has no params.new, this model expects (64, 64) bfloat16"
    assert message(lambda p: p.pop("wte")) == f"{saved}, which this model does not have"
    many = message(lambda p: [p.set(f"new{i}", half) for i in range(9)])
    assert many.count("; it ") == 2 and many.endswith("(and 6 more differences)")


@pytest.mark.parametrize(
    ("options", "scores", "kept"),
    [
        (dict(keep_last=2), [1, 2, 3, 4], [1, 3, 4]),
        (dict(keep_last=2), [None, 2, None, None, None], [2, 4, 5]),
        (dict(keep_last=2), [2, 2, 5, 6], [2, 3, 4]),  # the newer of equals
        (dict(keep_last=1), [3, float("nan"), float("inf"), 5], [1, 4]),
        (dict(keep_last=2, keep_best=False), [1, 2, 3, 4], [3, 4]),
        (dict(keep_last=1, keep_every_steps=3), [1, 2, 3, 4, 5], [1, 3, 5]),
        (dict(keep_last=None), [1, 2, 3], [1, 2, 3]),
    ],
)
def test_retention_policy(tmp_path: Path, options: Any, scores: list[float | None], kept: list[int]) -> None:
    manager = checkpoint.open_manager(tmp_path, CheckpointConfig(**options))
    for step, score in enumerate(scores, start=1):
        if step == 3:  # the policy continues after a restart
            checkpoint.close(manager)
            manager = checkpoint.open_manager(tmp_path, CheckpointConfig(**options))
        checkpoint.save(manager, full_state(step), {}, metrics=None if score is None else {"val/bpb": score})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == kept
    assert not other_files(tmp_path)
    metrics = checkpoint.step_metrics(tmp_path)
    assert [metrics[step].get("val/bpb") for step in kept] == [scores[step - 1] for step in kept]


def test_step_deleted_by_hand_is_forgotten(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, 1, 2, keep_last=2)
    shutil.rmtree(tmp_path / "2")
    checkpoint.save(manager, full_state(2), {})
    checkpoint.wait(manager)
    assert_same(checkpoint.restore(tmp_path, full_state(2))[0], full_state(2))
    shutil.rmtree(tmp_path / "2")
    checkpoint.save(manager, full_state(3), {})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == [1, 3]  # the deleted step does not count as one of the last two


def test_metrics_can_be_added_to_a_saved_step(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, 1, keep_last=1)
    checkpoint.save(manager, full_state(1), {}, metrics={"val/bpb": 1.5})  # after the evaluation
    assert checkpoint.step_metrics(tmp_path) == {1: {"val/bpb": 1.5}} and not list(tmp_path.rglob("*.part"))
    checkpoint.save(manager, full_state(1), {}, metrics={"val/bpb": 9.0})  # existing metrics are kept
    for step in (2, 3):
        checkpoint.save(manager, full_state(step), {}, metrics={"val/bpb": 2.0})
    checkpoint.close(manager)
    assert checkpoint.step_metrics(tmp_path) == {1: {"val/bpb": 1.5}, 3: {"val/bpb": 2.0}}
    assert_same(checkpoint.restore(tmp_path, full_state(1), step=1)[0], full_state(1))


def test_existing_step_is_kept_and_refused_with_other_values(tmp_path: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, full_state(1), {}, arrays={"position": np.arange(3)})
    checkpoint.wait(manager)
    before, other = times(), full_state(1)
    checkpoint.save(manager, full_state(1), {}, arrays={"position": np.arange(3)})
    other.params["h", "1", "half"][0] += 1
    with pytest.raises(UserError, match=r"1 exists with another params\.h\.1\.half: delete it, or save to another"):
        checkpoint.save(manager, other, {}, arrays={"position": np.arange(3)})
    with pytest.raises(UserError, match="exists with another position"):
        checkpoint.save(manager, full_state(1), {}, arrays={"position": np.arange(4)})
    checkpoint.close(manager)
    assert times() == before


def test_open_removes_what_a_killed_save_left_and_readers_do_not(tmp_path: Path) -> None:
    checkpoint.close(save_steps(tmp_path, 1))
    suffix = storage.orbax().utils.TMP_DIR_SUFFIX
    left = [tmp_path / f"2{suffix}-123" / "state", tmp_path / storage.DELETED / "0" / "state"]
    for path in left:
        path.mkdir(parents=True)
    checkpoint.restore(tmp_path, full_state(1))
    checkpoint.load_params(tmp_path)
    assert checkpoint.steps(tmp_path) == [1] and all(path.exists() for path in left)
    checkpoint.close(checkpoint.open_manager(tmp_path))
    assert checkpoint.steps(tmp_path) == [1] and not other_files(tmp_path)


@pytest.fixture
def limit_file_size() -> Iterator[Callable[[], None]]:
    """Call it to let no file grow over 64 kB: the write fails in the background, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("surfaces", ["wait", "save", "close"])
def test_background_error_is_raised_once_and_damages_nothing(
    tmp_path: Path, limit_file_size: Any, capfd: Any, surfaces: str
) -> None:
    manager = save_steps(tmp_path, 1, keep_last=1)
    limit_file_size()
    checkpoint.save(manager, full_state(2, width=1250), {})  # returns: the error comes later
    with pytest.raises(UserError) as caught:
        if surfaces == "save":
            checkpoint.save(manager, full_state(3), {})
        else:
            getattr(checkpoint, surfaces)(manager)
    assert re.fullmatch(
        rf"checkpoint of step 2 could not be written to {re.escape(str(tmp_path))} \(.*too large.*\); "
        r"it needs 1\.7 MB, [\d.]+ MB are free; step 1 is intact",
        str(caught.value),
    )
    assert capfd.readouterr() == ("", "")
    assert checkpoint.steps(tmp_path) == [1] and not other_files(tmp_path)
    if surfaces != "close":
        checkpoint.save(manager, full_state(4), {})  # the manager still works
        checkpoint.close(manager)
        assert checkpoint.steps(tmp_path) == [4]


@pytest.mark.parametrize(
    ("keep_last", "steps", "deleted"), [(2, [1, 2], {1}), (2, [1], None), (1, [1], None), (None, [1, 2], None)]
)
def test_steps_due_for_deletion_are_deleted_first_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int, steps: list[int], deleted: set[int] | None
) -> None:
    manager = checkpoint.open_manager(tmp_path, CheckpointConfig(keep_last=keep_last))
    for step in steps:
        checkpoint.save(manager, full_state(step, width=5000), {})
    checkpoint.wait(manager)
    one_step = sum(p.stat().st_size for p in (tmp_path / "1").rglob("*") if p.is_file())

    def usage(path: Path) -> Any:  # a disk with room for half a step more
        used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        return shutil._ntuple_diskusage(0, used, len(steps) * one_step + one_step // 2 + 2**20 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    if deleted is None:
        message = r"step 9 needs [34]\.\d MB, .* has 2\.\d MB free: make room or save to another folder; step [12] is"
        with pytest.raises(UserError, match=message):
            checkpoint.save(manager, full_state(9, width=5000), {})
        monkeypatch.undo()
        checkpoint.save(manager, full_state(10), {})  # the manager still works
        checkpoint.close(manager)
        assert checkpoint.latest_step(tmp_path) == 10
    else:
        checkpoint.save(manager, full_state(9, width=5000), {})
        assert not deleted & set(checkpoint.steps(tmp_path))  # while 9 is still being written
        checkpoint.close(manager)
        assert checkpoint.steps(tmp_path) == sorted({*steps, 9} - deleted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 30 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root on Linux")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_disk_that_fills_up_while_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    folder = small_disk / "run"
    width = 20_000  # 10 MB a step
    manager = save_steps(folder)
    for step in (1, 2):
        checkpoint.save(manager, full_state(step, width), {})
    (small_disk / "other").write_bytes(bytes(5 * 2**20))
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage("/"))
    checkpoint.save(manager, full_state(3, width), {})
    free_before = usage(small_disk).free
    with pytest.raises(UserError, match=r"step 3 could not be written to .*No space left.*; step 2 is intact"):
        checkpoint.close(manager)
    # The writer may not have started when this was measured, and a grown directory keeps its few pages.
    assert usage(small_disk).free >= free_before - 2**16
    assert checkpoint.steps(folder) == [1, 2] and not other_files(folder)
    assert_same(checkpoint.restore(folder, abstract(full_state(2, width)))[0], full_state(2, width))
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_cuda_state_is_restored_to_cuda(tmp_path: Path) -> None:
    state = full_state(1)
    on_gpu = State(*(tree.to(field, "cuda") for field in state))
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, on_gpu, {})
    for leaf in tree.leaves(on_gpu):
        leaf.zero_()
    got, _, _ = checkpoint.restore(manager, abstract(state), device="cuda")
    checkpoint.close(manager)
    assert_same(State(*(tree.to(field, "cpu") for field in got)), state)
    assert all(leaf.is_cuda for leaf in tree.leaves(got))
