"""Checkpoints: bit-exact, atomic, verified; and the faults they have to survive."""

import collections
import dataclasses
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from nanochat import tree
from nanochat.checkpoint import CheckpointConfig, CorruptCheckpointError, integrity, storage
from nanochat.checkpoint import manager as checkpoint
from nanochat.checkpoint.integrity import fingerprint
from nanochat.config import UserError

ROOT = Path(__file__).resolve().parents[2]


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    scaler: Any = torch.tensor(65536.0)


def nest(leaves: dict[str, torch.Tensor]) -> TensorDict:
    return tree.unflatten(leaves)


def make_state(step: int, rows: int = 50) -> State:
    """A small state whose values follow from the step."""
    g = torch.Generator().manual_seed(step)
    params = {
        "wte": torch.randn(rows, 8, generator=g),
        "h.0.q": torch.randn(30, 40, generator=g).bfloat16(),
        "h.0.k": torch.randn(30, 40, generator=g).bfloat16(),
        "h.1.q": torch.randn(3, generator=g).half(),
    }
    opt_state = {
        "wte.mu": torch.randn(rows, 8, generator=g),
        "count": torch.tensor(step, dtype=torch.int32),
        "big": torch.tensor([2**62 + step, -(2**53) - 1, -1]),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "none": torch.empty(0, 4),
    }
    return State(torch.tensor(step), nest(params), nest(opt_state))


def bits(x: torch.Tensor) -> torch.Tensor:
    return (
        x
        if x.dtype == torch.bool
        else x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    )


def assert_same(got: Any, want: Any) -> None:
    a, b = tree.flatten(got._asdict()), tree.flatten(want._asdict())
    assert list(a) == list(b)
    for name in a:
        assert type(a[name]) is torch.Tensor, name
        assert (a[name].shape, a[name].dtype, a[name].device) == (b[name].shape, b[name].dtype, b[name].device), name
        assert torch.equal(bits(a[name]), bits(b[name])), name


def saved(folder: Path, *steps: int, **keep: Any) -> checkpoint.Manager:
    manager = checkpoint.open_manager(folder, CheckpointConfig(**{"keep_last": None, **keep}))
    for step in steps:
        checkpoint.save(manager, make_state(step), {"seed": 1})
    checkpoint.wait(manager)
    return manager


def abstract(state: State) -> State:
    return State(*(tree.to(field, "meta") for field in state))


def temporary(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.isdecimal()]


# What is saved comes back


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    state = make_state(7)
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
    assert_same(got, state._replace(params=state.params.apply(torch.Tensor.contiguous)))
    assert got_meta == json.loads(json.dumps(meta))
    assert list(got_arrays) == list(arrays)
    for name, want in arrays.items():
        want = storage.to_numpy(want) if isinstance(want, torch.Tensor) else want
        array = got_arrays[name]
        assert type(array) is np.ndarray and (array.shape, array.dtype) == (want.shape, want.dtype), name
        assert array.tobytes() == want.tobytes(), name
    got.params["wte"].add_(1)  # real, writable memory
    _, _, files = checkpoint.load_params(tmp_path / "run")
    assert files == {"tokenizer.txt": tmp_path / "run/7/files/tokenizer.txt"}
    assert files["tokenizer.txt"].read_bytes() == b"a\x00\xff\r\n"
    checkpoint.close(manager)
    again, _, _ = checkpoint.restore(tmp_path / "run", state)  # from the folder alone, by a concrete state
    assert_same(again, state._replace(params=state.params.apply(torch.Tensor.contiguous)))
    import jax

    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


def test_save_holds_a_copy_when_it_returns(tmp_path: Path) -> None:
    big = nest({f"w{i}": torch.full((1000, 500), float(i)) for i in range(8)})
    state = State(torch.tensor(1), big, nest({"m": torch.ones(3)}))
    buffer = np.ones(10)
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, state, {}, arrays={"buffer": buffer})
    for leaf in tree.leaves(big):
        leaf.fill_(-1)
    state.opt_state["m"].zero_()
    state.step.add_(1)
    buffer[:] = 0
    got, _, arrays = checkpoint.restore(manager, state, step=1)
    assert got.step == 1 and got.opt_state["m"].eq(1).all() and (arrays["buffer"] == 1).all()
    assert all(got.params[f"w{i}"].eq(i).all() for i in range(8))
    checkpoint.close(manager)


def test_plain_jax_and_orbax_read_it(tmp_path: Path) -> None:
    checkpoint.close(saved(tmp_path, 3))
    want = tmp_path / "want.npy"
    np.save(want, make_state(3).params["wte"].numpy())
    program = f"""
        import jax, numpy as np, orbax.checkpoint as ocp
        manager = ocp.CheckpointManager({str(tmp_path)!r}, item_names=("state", "meta"))
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(), meta=ocp.args.JsonRestore())
        got = manager.restore(manager.latest_step(), args=items)
        params = jax.tree.map(jax.numpy.asarray, got.state["params"])
        assert got.meta["meta"] == {{"seed": 1}} and isinstance(params["wte"], jax.Array)
        np.testing.assert_array_equal(params["wte"], np.load({str(want)!r}))
        assert params["h"]["0"]["q"].dtype == jax.numpy.bfloat16 and got.state["opt_state"]["big"][0] == 2**62 + 3
    """
    run_python(program)


def test_load_params_reads_params_alone(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2)
    checkpoint.close(manager)
    params, meta, files = checkpoint.load_params(tmp_path)
    assert_same(State(torch.tensor(2), params, nest({})), State(torch.tensor(2), make_state(2).params, nest({})))
    assert meta == {"seed": 1} and files == {}
    half, _, _ = checkpoint.load_params(tmp_path, step=1, dtype=torch.bfloat16)
    assert torch.equal(half["wte"], make_state(1).params["wte"].bfloat16())
    flip_in_leaf(tmp_path / "2", make_state(2).opt_state["wte", "mu"])
    params, _, _ = checkpoint.load_params(tmp_path)
    assert torch.equal(params["wte"], make_state(2).params["wte"])
    with pytest.raises(CorruptCheckpointError, match=r"opt_state\.wte\.mu"):
        checkpoint.restore(tmp_path, make_state(2))


def test_which_step_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.restore(tmp_path / "nowhere", make_state(0))
    manager = saved(tmp_path, 0, 9, 10)
    assert checkpoint.steps(manager) == checkpoint.steps(tmp_path) == [0, 9, 10]
    assert checkpoint.latest_step(tmp_path) == 10
    assert checkpoint.restore(manager, make_state(0), step=9)[0].step == 9
    with pytest.raises(UserError, match=r"no checkpoint of step 5 in .*; there are steps 0, 9, 10"):
        checkpoint.restore(manager, make_state(0), step=5)
    checkpoint.save(manager, make_state(11), {})
    assert checkpoint.restore(manager, make_state(0))[0].step == 11  # waits for what is being written
    checkpoint.close(manager)


# Which steps stay


@pytest.mark.parametrize(
    ("keep", "scores", "stay"),
    [
        (dict(keep_last=1), [3, 1, 2, 4], [2, 4]),
        (dict(keep_last=2), [1, 2, 3, 4], [1, 3, 4]),
        (dict(keep_last=2), [4, 3, 2, 1], [3, 4]),
        (dict(keep_last=2), [None, 2, None, None, None], [2, 4, 5]),
        (dict(keep_last=2), [2, 2, 5, 6], [2, 3, 4]),  # of equals the newer
        (dict(keep_last=1), [3, float("nan"), float("inf"), 5], [1, 4]),
        (dict(keep_last=2, keep_best=False), [1, 2, 3, 4], [3, 4]),
        (dict(keep_last=1, keep_best=False, keep_every_steps=2), [1, 2, 3, 4, 5], [2, 4, 5]),
        (dict(keep_last=1, keep_every_steps=3), [1, 2, 3, 4, 5], [1, 3, 5]),
        (dict(keep_last=None), [1, 2, 3], [1, 2, 3]),
    ],
)
def test_exactly_these_steps_stay(tmp_path: Path, keep: Any, scores: list[float | None], stay: list[int]) -> None:
    manager = checkpoint.open_manager(tmp_path, CheckpointConfig(**keep))
    for step, score in enumerate(scores, start=1):
        if step == 3:  # the policy goes on over a restart
            checkpoint.close(manager)
            manager = checkpoint.open_manager(tmp_path, CheckpointConfig(**keep))
        checkpoint.save(manager, make_state(step), {}, metrics=None if score is None else {"val/bpb": score})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == stay
    assert not temporary(tmp_path)
    found = checkpoint.step_metrics(tmp_path)
    assert [found[step].get("val/bpb") for step in stay] == [scores[step - 1] for step in stay]


# A step that exists


def test_an_existing_step_is_left_alone_if_it_is_the_same(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    checkpoint.save(manager, make_state(1), {"seed": 1})
    checkpoint.close(manager)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_metrics_can_be_added_to_a_saved_step(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, keep_last=1)
    checkpoint.save(manager, make_state(1), {}, metrics={"val/bpb": 1.5})  # after the evaluation
    assert checkpoint.step_metrics(manager) == {1: {"val/bpb": 1.5}} and not list(tmp_path.rglob("*.partial"))
    checkpoint.save(manager, make_state(1), {}, metrics={"val/bpb": 9.0})  # the first ones stand
    for step in (2, 3):
        checkpoint.save(manager, make_state(step), {}, metrics={"val/bpb": 2.0})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == [1, 3]
    assert_same(checkpoint.restore(tmp_path, make_state(1), step=1)[0], make_state(1))


def test_an_existing_step_with_other_values_is_refused(tmp_path: Path) -> None:
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, make_state(1), {}, arrays={"place": np.arange(3)})
    other = make_state(1)
    other.params["h", "1", "q"][0] += 1
    with pytest.raises(UserError, match=r"1 exists with another params\.h\.1\.q: delete it, or save to another"):
        checkpoint.save(manager, other, {}, arrays={"place": np.arange(3)})
    with pytest.raises(UserError, match="exists with another place"):
        checkpoint.save(manager, make_state(1), {}, arrays={"place": np.arange(4)})
    checkpoint.save(manager, make_state(2), {})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert_same(checkpoint.restore(tmp_path, make_state(1), step=1)[0], make_state(1))


def test_an_existing_step_that_is_damaged_is_replaced(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2)
    flip_in_leaf(tmp_path / "2", make_state(2).params["wte"])
    checkpoint.save(manager, make_state(2), {})
    checkpoint.close(manager)
    assert_same(checkpoint.restore(tmp_path, make_state(2))[0], make_state(2))
    assert checkpoint.steps(tmp_path) == [1, 2] and not temporary(tmp_path)


def test_a_step_deleted_by_hand_is_gone_for_the_manager_too(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2, keep_last=2)
    shutil.rmtree(tmp_path / "2")
    checkpoint.save(manager, make_state(2), {})
    checkpoint.wait(manager)
    assert_same(checkpoint.restore(tmp_path, make_state(2))[0], make_state(2))
    shutil.rmtree(tmp_path / "2")
    checkpoint.save(manager, make_state(3), {})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == [1, 3]  # the one that is gone does not count as one of the last two


# Another model's checkpoint


def test_names_shapes_and_dtypes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    checkpoint.close(saved(tmp_path, 1))
    shutil.rmtree(tmp_path / "1" / "state")  # reading would fail otherwise

    def message(change: Any) -> str:
        want = make_state(1)
        change(want.params)
        with pytest.raises(UserError) as caught:
            checkpoint.restore(tmp_path, abstract(want))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    start = f"checkpoint {tmp_path / '1'} "
    assert message(lambda p: p.set("wte", torch.zeros(8, 50))) == (
        start + "has params.wte (50, 8) float32, this model expects (8, 50) float32"
    )
    assert message(lambda p: p.set("wte", torch.zeros(50, 8).bfloat16())) == (
        start + "has params.wte (50, 8) float32, this model expects (50, 8) bfloat16"
    )
    assert (
        message(lambda p: p.set("new", torch.zeros(2))) == start + "has no params.new, this model expects (2) float32"
    )
    assert message(lambda p: p.pop("wte")) == start + "has params.wte (50, 8) float32, which this model does not have"
    many = message(lambda p: [p.set(f"new{i}", torch.zeros(2)) for i in range(9)])
    assert many.count("; it ") == 2 and many.endswith("(and 6 more differences)")


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    manager = checkpoint.open_manager(tmp_path)
    state = make_state(1)
    with pytest.raises(UserError, match=r"params\.odd is float64"):
        checkpoint.save(manager, state._replace(params=nest({"odd": torch.zeros(1, dtype=torch.float64)})), {})
    with pytest.raises(UserError, match="array words is <U1: checkpoints hold numbers"):
        checkpoint.save(manager, state, {}, arrays={"words": np.array(["a"])})
    with pytest.raises(UserError, match=r"file \.\./x: expected a name without folders"):
        checkpoint.save(manager, state, {}, files={"../x": Path(__file__)})
    with pytest.raises(UserError, match=r"gone\.txt cannot be copied to the checkpoint \(No such file"):
        checkpoint.save(manager, state, {}, files={"x": tmp_path / "gone.txt"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(manager, state, {"x": torch.zeros(1)})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == [] and not temporary(tmp_path)


# Damage


def flip_in_leaf(step: Path, leaf: torch.Tensor, bit: int = 0) -> None:
    """Flip a bit in the middle of the stored bytes of a leaf over a kilobyte; orbax puts smaller ones under a CRC."""
    stored = bits(leaf).numpy().tobytes()
    found = [p for p in (step / "state").rglob("*") if p.is_file() and stored in p.read_bytes()]
    assert len(found) == 1
    flip(found[0], at=found[0].read_bytes().index(stored) + len(stored) // 2, bit=bit)


def flip(path: Path, *, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    checkpoint.close(saved(tmp_path, 1, 2))
    flip_in_leaf(tmp_path / "2", make_state(2).params["h", "0", "k"], bit=3)
    expected = re.escape(
        f"checkpoint {tmp_path / '2'}: params.h.0.k is corrupt: bytes in {tmp_path / '2' / 'state'} have changed; "
        f"step 1 exists too: delete {tmp_path / '2'} to resume from it"
    )
    with pytest.raises(CorruptCheckpointError, match=f"^{expected}$"):
        checkpoint.restore(tmp_path, make_state(2))
    shutil.rmtree(tmp_path / "2")  # what the message says
    assert_same(checkpoint.restore(tmp_path, make_state(1))[0], make_state(1))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # tracebacks on stderr
def test_a_flipped_bit_anywhere_never_gives_wrong_values(tmp_path: Path) -> None:
    state, arrays = make_state(1), {"tokens": np.arange(5000, dtype=np.uint16)}
    (tmp_path / "f.txt").write_text("some words")
    manager = checkpoint.open_manager(tmp_path / "run")
    checkpoint.save(
        manager, state, {"lr": 0.125}, arrays=arrays, files={"f": tmp_path / "f.txt"}, metrics={"val/bpb": 1}
    )
    checkpoint.close(manager)
    outcomes = collections.Counter()
    rng = np.random.default_rng(0)
    for path in sorted(p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.stat().st_size):
        original = path.read_bytes()
        places = {0, len(original) // 2, len(original) - 1, int(rng.integers(len(original)))}
        for at in places:
            flip(path, at=at, bit=int(rng.integers(8)))
            try:
                got, meta, got_arrays = checkpoint.restore(tmp_path / "run", state)
                _, _, files = checkpoint.load_params(tmp_path / "run")
            except UserError as error:
                assert "\n" not in str(error) and str(tmp_path / "run" / "1") in str(error)
                outcomes["noticed"] += 1
            else:
                assert_same(got, state)
                assert meta == {"lr": 0.125} and np.array_equal(got_arrays["tokens"], arrays["tokens"])
                assert files["f"].read_text() == "some words"
                outcomes["harmless"] += 1
            path.write_bytes(original)
    assert outcomes["noticed"] >= 20, outcomes
    assert_same(checkpoint.restore(tmp_path / "run", state)[0], state)


def rewrite_state(step: Path, change: Any) -> None:
    """Write the state item anew, as orbax would on its own, with other leaves and the old header."""
    with storage.orbax().PyTreeCheckpointer() as plain:
        leaves = dict(tree.flatten(plain.restore(step / "state")))
        change(leaves)
        shutil.rmtree(step / "state")
        plain.save(step / "state", tree.nest(leaves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.update({"params.h.0.q": x["params.h.0.k"], "params.h.0.k": x["params.h.0.q"]}),
            "h.0.q is corrupt",
        ),
        (lambda x: x.pop("params.wte"), "params.wte in .* is missing"),
        (
            lambda x: x.update({"params.wte": x["params.wte"].astype(np.float16)}),
            "params.wte in .* has another shape or dtype",
        ),
        (lambda x: x.update({"params.wte": x["params.wte"].T.copy()}), "params.wte in .* has another shape or dtype"),
        (lambda x: x.update({"params.wte": x["params.wte"][::-1].copy()}), "params.wte is corrupt"),
    ],
    ids=["exchanged", "absent", "cast", "reshaped", "rows"],
)
def test_leaves_that_orbax_would_hand_out_silently(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint.close(saved(tmp_path, 1))
    rewrite_state(tmp_path / "1", lambda leaves: None)
    assert_same(checkpoint.restore(tmp_path, make_state(1))[0], make_state(1))
    rewrite_state(tmp_path / "1", change)
    with pytest.raises(CorruptCheckpointError, match=message):
        checkpoint.restore(tmp_path, make_state(1))


def test_a_changed_value_in_the_header_is_noticed(tmp_path: Path) -> None:
    checkpoint.close(saved(tmp_path, 1))
    path = tmp_path / "1" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 3'))
    for read in (checkpoint.load_params, lambda folder: checkpoint.restore(folder, make_state(1))):
        with pytest.raises(CorruptCheckpointError, match="meta/metadata has changed since it was written"):
            read(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoint.close(saved(tmp_path, 1))
    path = tmp_path / "1" / "meta" / "metadata"
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "format": integrity.FORMAT + 1}))
    with pytest.raises(UserError, match=r"1 has format 2, this nanochat reads 1: update nanochat") as caught:
        checkpoint.restore(tmp_path, make_state(1))
    assert not isinstance(caught.value, CorruptCheckpointError)
    path.write_text(json.dumps({"other": "program"}))
    with pytest.raises(CorruptCheckpointError, match=r"metadata cannot be read .*there is no other step"):
        checkpoint.load_params(tmp_path)


def test_a_damaged_metrics_file_is_named_when_the_folder_is_opened(tmp_path: Path) -> None:
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, make_state(1), {}, metrics={"val/bpb": 1})
    checkpoint.close(manager)
    (tmp_path / "1" / "metrics" / "metrics").write_text('{"val/bpb')
    with pytest.raises(UserError, match=r"metrics/metrics cannot be read"):
        checkpoint.open_manager(tmp_path)


# Killed, stopped, out of room


# For every line `step phase delay`: save that step in a forked child, and kill it so many seconds after the save began
# (phase 0) or went on in the background (phase 1); let it live where the delay is negative. Prints the exit code and,
# of a child that lived, the seconds until `save` returned and from there until the end.
KILLED = """
    import os, sys, time
    import torch
    from nanochat import checkpoint
    from nanochat.checkpoint import storage
    from tests.checkpoint.test_manager import State, big_state
    torch.set_num_threads(1)  # no pool of threads: the children are forked
    storage.orbax()
    for line in sys.stdin:
        step, phase, delay = line.split()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            manager = checkpoint.open_manager(sys.argv[1], checkpoint.CheckpointConfig(keep_last=1))
            state = big_state(int(step))
            os.write(write, b".")
            begun = time.monotonic()
            checkpoint.save(manager, state, {})
            os.write(write, b".")
            returned = time.monotonic()
            checkpoint.close(manager)
            os.write(write, f"{returned - begun} {time.monotonic() - returned}".encode())
            os._exit(0)
        os.close(write)
        for _ in range(1 + int(phase)):
            os.read(read, 1)
        if float(delay) >= 0:
            time.sleep(float(delay))
            os.kill(pid, 9)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        took = os.read(read, 100).decode().lstrip(".")
        os.close(read)
        print(code, took, flush=True)
"""


def big_state(step: int) -> State:
    """40 MB that follow from the step."""
    whole = torch.arange(10_000_000, dtype=torch.int32).mul_(2 * step + 1).view(torch.float32)
    params = {f"h.{i}.w": whole[i * 10**6 : (i + 1) * 10**6].view(1000, 1000) for i in range(8)}
    return State(torch.tensor(step), nest(params), nest({"m": whole[8 * 10**6 :]}))


def test_a_save_killed_at_ten_moments_never_hurts(tmp_path: Path) -> None:
    forker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert forker.stdin and forker.stdout

    def run(step: int, phase: int, delay: float) -> list[float]:
        assert forker.stdin and forker.stdout
        print(step, phase, delay, file=forker.stdin, flush=True)
        return [float(number) for number in forker.stdout.readline().split()]

    def check(allowed: set[int]) -> int:
        there = checkpoint.steps(tmp_path)
        assert there and there[-1] in allowed
        for step in there:
            assert_same(checkpoint.restore(tmp_path, abstract(big_state(step)), step=step)[0], big_state(step))
        return there[-1]

    assert run(1, 0, -1)[0] == 0
    code, blocking_seconds, background_seconds = run(2, 0, -1)
    assert code == 0 and check({2}) == 2
    moments = [(0, blocking_seconds * i / 3) for i in range(3)]
    moments += [(1, background_seconds * i / 6) for i in range(7)]
    latest, interrupted = 2, 0
    for phase, delay in moments:
        code, *_ = run(latest + 1, phase, delay)
        assert code in (0, -signal.SIGKILL)
        interrupted += any("tmp" in path.name for path in temporary(tmp_path))
        latest = check({latest, latest + 1})
    assert interrupted, f"no kill fell into the {background_seconds:.2f} s of writing"
    forker.stdin.close()
    assert forker.wait(30) == 0
    checkpoint.close(checkpoint.open_manager(tmp_path))
    assert not temporary(tmp_path)
    assert check({latest}) == latest


def test_open_clears_what_a_killed_save_left_and_readers_do_not(tmp_path: Path) -> None:
    checkpoint.close(saved(tmp_path, 1))
    left = [
        tmp_path / f"2{storage.orbax().utils.TMP_DIR_SUFFIX}-123" / "state",
        tmp_path / storage.DELETED / "0" / "state",
    ]
    for path in left:
        path.mkdir(parents=True)
    checkpoint.restore(tmp_path, make_state(1))
    checkpoint.load_params(tmp_path)
    assert checkpoint.steps(tmp_path) == [1] and all(path.exists() for path in left)
    checkpoint.close(checkpoint.open_manager(tmp_path))
    assert checkpoint.steps(tmp_path) == [1] and not temporary(tmp_path)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call to let no file grow over 64 kB: the write fails in the background, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("surfaces", ["wait", "save", "close"])
def test_an_error_in_the_background_surfaces_once_and_hurts_nothing(
    tmp_path: Path, small_files: Any, capfd: Any, surfaces: str
) -> None:
    manager = saved(tmp_path, 1, keep_last=1)
    small_files()
    checkpoint.save(manager, make_state(2, rows=10_000), {})  # returns: the error comes later
    with pytest.raises(UserError) as caught:
        if surfaces == "save":
            checkpoint.save(manager, make_state(3), {})
        else:
            getattr(checkpoint, surfaces)(manager)
    message = str(caught.value)
    assert re.fullmatch(
        rf"checkpoint of step 2 could not be written to {re.escape(str(tmp_path))} \(.*\); "
        r"it needs 1\.7 MB, [\d.]+ MB are free; step 1 is intact",
        message,
    )
    assert "too large" in message
    assert capfd.readouterr() == ("", "")
    assert checkpoint.steps(tmp_path) == [1] and not temporary(tmp_path)
    if surfaces != "close":
        checkpoint.save(manager, make_state(4), {})  # fit for another try
        checkpoint.close(manager)
        assert checkpoint.steps(tmp_path) == [4]


def test_no_room_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = saved(tmp_path, 1, keep_last=1, keep_best=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(UserError) as caught:
        checkpoint.save(manager, make_state(2), {})
    assert str(caught.value) == (
        f"checkpoint of step 2 needs 1.1 MB, {tmp_path} has 0.1 MB free: make room or save to another folder; "
        "step 1 is intact"
    )
    assert checkpoint.steps(tmp_path) == [1] and not temporary(tmp_path)
    monkeypatch.undo()
    checkpoint.save(manager, make_state(2), {})
    checkpoint.close(manager)
    assert checkpoint.steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("keep_last", "steps", "gone"),
    [(2, [1, 2], {1}), (2, [1], None), (1, [1], None), (None, [1, 2], None)],
)
def test_steps_that_are_due_to_go_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int, steps: list[int], gone: set[int] | None
) -> None:
    manager = checkpoint.open_manager(tmp_path, CheckpointConfig(keep_last=keep_last))
    for step in steps:
        checkpoint.save(manager, make_state(step, rows=40_000), {})
    checkpoint.wait(manager)
    one_step = sum(p.stat().st_size for p in (tmp_path / "1").rglob("*") if p.is_file())

    def usage(path: Path) -> Any:  # a disk with room for one more step but for its last half
        used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        return shutil._ntuple_diskusage(0, used, len(steps) * one_step + one_step // 2 + 2**20 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    if gone is None:
        with pytest.raises(UserError, match=r"needs .* MB free: make room"):
            checkpoint.save(manager, make_state(9, rows=40_000), {})
        checkpoint.close(manager)
        assert checkpoint.steps(tmp_path) == steps
    else:
        checkpoint.save(manager, make_state(9, rows=40_000), {})
        assert not gone & set(checkpoint.steps(tmp_path))  # already, while 9 is being written
        checkpoint.close(manager)
        assert checkpoint.steps(tmp_path) == sorted({*steps, 9} - gone)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 30 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root on Linux")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    folder = small_disk / "run"
    rows = 160_000  # 10 MB a step
    manager = checkpoint.open_manager(folder, CheckpointConfig(keep_last=None))
    for step in (1, 2):
        checkpoint.save(manager, make_state(step, rows), {})
    with pytest.raises(UserError, match=r"step 3 needs 11\.4 MB, .* has 1[01]\.\d MB free.*step 2 is intact"):
        checkpoint.save(manager, make_state(3, rows), {})
    (small_disk / "other").write_bytes(bytes(5 * 2**20))
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage("/"))  # it fills up while we write
    checkpoint.save(manager, make_state(3, rows), {})
    free_before = usage(small_disk).free
    with pytest.raises(UserError, match=r"step 3 could not be written to .*No space left.*; step 2 is intact"):
        checkpoint.close(manager)
    # The writer may not have begun when it was measured, and a grown directory keeps its few pages.
    assert usage(small_disk).free >= free_before - 2**16
    assert checkpoint.steps(folder) == [1, 2] and not temporary(folder)
    assert_same(checkpoint.restore(folder, abstract(make_state(2, rows)))[0], make_state(2, rows))
    assert capfd.readouterr() == ("", "")


PROGRAM = """
    import os, signal, socket, sys
    from pathlib import Path
    from nanochat import checkpoint
    from nanochat.checkpoint import storage
    assert not {"jax", "orbax.checkpoint", "tensorstore"} & set(sys.modules)
    from tests.checkpoint.test_manager import make_state
    caught = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    storage.orbax()
    import jax
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)  # where jax takes SIGTERM by default
    manager = checkpoint.open_manager(Path(sys.argv[1]))
    assert "JAX_PLATFORMS" not in os.environ and jax.config.jax_platforms == "cpu"
    checkpoint.save(manager, make_state(1), {})
    checkpoint.save(manager, make_state(2), {}, metrics={"val/bpb": 1.0})
    checkpoint.restore(manager, make_state(1))
    os.kill(os.getpid(), signal.SIGTERM)
    assert caught == [signal.SIGTERM]
    checkpoint.close(manager)
    checkpoint.load_params(sys.argv[1])
    print("done", file=sys.stderr)
"""


def run_python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        check=True,
        text=True,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        timeout=60,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("JAX_")}, **environment},
    )


def test_it_is_lazy_and_quiet_and_leaves_sigterm_to_the_program(tmp_path: Path) -> None:
    assert run_python(PROGRAM, str(tmp_path)).stderr == "done\n"


# Refusals


def test_bad_settings_and_folders_are_named(tmp_path: Path) -> None:
    for name in ("every_steps", "keep_last", "keep_every_steps"):
        with pytest.raises(UserError, match=f"checkpoint.{name}=0: expected a number above 0, or none"):
            checkpoint.open_manager(tmp_path / "run", dataclasses.replace(CheckpointConfig(), **{name: 0}))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint folder .*file/run cannot be created"):
        checkpoint.open_manager(tmp_path / "file" / "run")


# Fingerprints


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=g).bool()
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=g, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def test_fingerprints_stay_what_they_are_on_disk() -> None:
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    mask = 2**64 - 1

    def weight(dim: int, i: int) -> int:
        z = (i + 1 + (dim << 40)) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return (z ^ (z >> 31)) | 1

    rows = x.view(torch.int32).tolist()
    want = sum(v * weight(0, i) * weight(1, j) for i, row in enumerate(rows) for j, v in enumerate(row)) & mask
    assert fingerprint(x) == want == 281522305708851200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprints_of_shards_add_up(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    for shape in [(), (1,), (7,), (5, 9), (4, 3, 5), (2, 1, 3, 4), (0, 3)]:
        x = random_tensor(shape, dtype)
        whole = fingerprint(x)
        pieces = [(x, [0] * x.ndim)]
        for dim in range(x.ndim):  # cut every dimension at up to three uneven places
            cut = []
            for piece, offsets in pieces:
                edges = sorted({0, piece.shape[dim], *rng.integers(0, piece.shape[dim] + 1, 3).tolist()})
                for a, b in itertools.pairwise(edges):
                    cut.append((piece.narrow(dim, a, b - a), [o + a * (d == dim) for d, o in enumerate(offsets)]))
            pieces = cut or pieces
        assert sum(fingerprint(p, o) for p, o in pieces) % 2**64 == whole, shape
        assert sum(fingerprint(p.contiguous(), o) for p, o in pieces) % 2**64 == whole, shape


def test_fingerprints_do_not_depend_on_the_chunks() -> None:
    x = random_tensor((3001, 1009), torch.int32)  # several chunks, cut unevenly
    rows = [fingerprint(x[a : a + 100], [a, 0]) for a in range(0, 3001, 100)]
    columns = [fingerprint(x[:, a : a + 500], [0, a]) for a in range(0, 1009, 500)]
    assert sum(rows) % 2**64 == sum(columns) % 2**64 == fingerprint(x)
    wide = x.reshape(1, -1)
    assert fingerprint(wide) != fingerprint(wide.flip(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprints_notice_every_single_bit(dtype: torch.dtype) -> None:
    x = random_tensor((3, 4), dtype)
    raw = x.view(torch.uint8).reshape(-1)
    whole, seen = fingerprint(x), set()
    for at in range(raw.numel()):
        for bit in [0] if dtype == torch.bool else range(8):
            raw[at] ^= 1 << bit
            seen.add(fingerprint(x))
            raw[at] ^= 1 << bit
    assert whole not in seen and len(seen) == raw.numel() * (1 if dtype == torch.bool else 8)


@pytest.mark.parametrize("x", [torch.eye(8), torch.arange(64.0).view(8, 8), torch.eye(8, dtype=torch.int64) << 40])
def test_fingerprints_notice_exchanges(x: torch.Tensor) -> None:
    whole = fingerprint(x)
    changed = {"flip": x.flip(0), "roll": x.roll(1, 1), "negated": -x}
    if not torch.equal(x, x.T):
        changed["transposed"] = x.T
    for i in range(8):
        for j in range(i):
            order = list(range(8))
            order[i], order[j] = j, i
            changed[f"rows {i} {j}"], changed[f"columns {i} {j}"] = x[order], x[:, order]
            elements = x.clone()
            elements[i, i], elements[i, j] = x[i, j], x[i, i]
            changed[f"elements {i} {j}"] = elements
    for name, other in changed.items():
        assert fingerprint(other) != whole, name


def test_bfloat16_goes_by_its_bits() -> None:
    x = random_tensor((100,), torch.bfloat16)
    array = storage.to_numpy(x)
    assert array.dtype == np.dtype(ml_dtypes.bfloat16)
    assert np.array_equal(array.view(np.int16), x.view(torch.int16).numpy())
    assert torch.equal(storage.to_tensor(array).view(torch.int16), x.view(torch.int16))


@pytest.mark.gpu
def test_cuda_leaves(tmp_path: Path) -> None:
    state = make_state(1)
    on_gpu = State(*(tree.to(field, "cuda") for field in state))
    for a, b in zip(tree.leaves(state), tree.leaves(on_gpu)):
        assert fingerprint(a) == fingerprint(b)
    big = random_tensor((5000, 4001), torch.bfloat16)
    assert fingerprint(big) == fingerprint(big.cuda())
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, on_gpu, {})
    for leaf in tree.leaves(on_gpu):
        leaf.zero_()
    got, _, _ = checkpoint.restore(manager, abstract(state), device="cuda")
    checkpoint.close(manager)
    assert_same(got, State(*(tree.to(field, "cuda") for field in state)))
