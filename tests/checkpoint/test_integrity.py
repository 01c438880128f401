"""Checksums, and that no corrupt byte, leaf, array, file or header is restored as if it were intact."""

import collections
import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks_checkpoint import assert_same, flip_bit, full_state, save_steps

from nanochat import tree
from nanochat.checkpoint import CorruptCheckpointError, integrity, storage
from nanochat.checkpoint import manager as checkpoint
from nanochat.config import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool]


def test_flipped_bit_names_the_leaf_and_the_fix(tmp_path: Path) -> None:
    checkpoint.close(save_steps(tmp_path, 1, 2))
    step = tmp_path / "2"
    flip_bit(step, full_state(2).opt_state["wte", "mu"])
    expected = (
        f"checkpoint {step}: opt_state.wte.mu is corrupt: bytes in {step / 'state'} have changed; "
        f"step 1 exists too: delete {step} to resume from it"
    )
    with pytest.raises(CorruptCheckpointError, match=f"^{re.escape(expected)}$"):
        checkpoint.restore(tmp_path, full_state(2))
    assert torch.equal(checkpoint.load_params(tmp_path)[0]["wte"], full_state(2).params["wte"])
    shutil.rmtree(step)
    assert_same(checkpoint.restore(tmp_path, full_state(1))[0], full_state(1))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # tracebacks on stderr
def test_flipped_bit_anywhere_never_gives_wrong_values(tmp_path: Path) -> None:
    state, tokens = full_state(1), np.arange(5000, dtype=np.uint16)
    run = tmp_path / "run"
    (tmp_path / "f.txt").write_text("some words")
    manager = checkpoint.open_manager(run)
    files = {"f": tmp_path / "f.txt"}
    checkpoint.save(manager, state, {"lr": 0.125}, arrays={"tokens": tokens}, files=files, metrics={"val/bpb": 1})
    checkpoint.close(manager)
    outcomes = collections.Counter()
    rng = np.random.default_rng(0)
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.stat().st_size):
        original = path.read_bytes()
        for at in {0, len(original) // 2, len(original) - 1, int(rng.integers(len(original)))}:
            path.write_bytes(original[:at] + bytes([original[at] ^ 1 << int(rng.integers(8))]) + original[at + 1 :])
            try:
                got, meta, arrays = checkpoint.restore(run, state)
                _, _, copies = checkpoint.load_params(run)
            except UserError as error:
                assert "\n" not in str(error) and str(run / "1") in str(error)
                outcomes["detected"] += 1
            else:
                assert_same(got, state)
                assert meta == {"lr": 0.125} and np.array_equal(arrays["tokens"], tokens)
                assert copies["f"].read_text() == "some words"
                outcomes["harmless"] += 1
            path.write_bytes(original)
    assert outcomes["detected"] >= 20, outcomes
    assert_same(checkpoint.restore(run, state)[0], state)


def rewrite_state(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the state item as plain orbax would, with other leaves and the old header."""
    with storage.orbax().PyTreeCheckpointer() as plain:
        leaves = dict(tree.flatten(plain.restore(step / "state")))
        change(leaves)
        shutil.rmtree(step / "state")
        plain.save(step / "state", tree.nest(leaves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update({"params.h.0.q": x["params.h.0.k"]}), "h.0.q is corrupt"),
        (lambda x: x.pop("params.wte"), "params.wte in .* is missing"),
        (lambda x: x.update({"params.wte": x["params.wte"].astype(np.float16)}), "wte in .* another shape or dtype"),
        (lambda x: x.update({"params.wte": x["params.wte"][:, :8].copy()}), "wte in .* another shape or dtype"),
        (lambda x: x.update({"params.wte": x["params.wte"][::-1].copy()}), "params.wte is corrupt"),
    ],
    ids=["copied", "missing", "cast", "sliced", "reversed"],
)
def test_leaves_that_orbax_would_return_silently_are_detected(tmp_path: Path, change: Any, message: str) -> None:
    checkpoint.close(save_steps(tmp_path, 1))
    rewrite_state(tmp_path / "1", lambda leaves: None)
    assert_same(checkpoint.restore(tmp_path, full_state(1))[0], full_state(1))
    rewrite_state(tmp_path / "1", change)
    with pytest.raises(CorruptCheckpointError, match=message):
        checkpoint.restore(tmp_path, full_state(1))


def test_changed_header_is_detected_and_a_newer_format_refused(tmp_path: Path) -> None:
    checkpoint.close(save_steps(tmp_path, 1))
    path = tmp_path / "1" / "meta" / "metadata"
    header = json.loads(path.read_text())

    def error(content: Any) -> UserError:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            checkpoint.restore(tmp_path, full_state(1))
        with pytest.raises(type(caught.value), match=re.escape(str(caught.value))):
            checkpoint.load_params(tmp_path)
        return caught.value

    changed = error({**header, "meta": {"seed": 3}})
    assert isinstance(changed, CorruptCheckpointError) and "metadata has changed since it was written" in str(changed)
    newer = error({**header, "format": integrity.FORMAT + 1})
    assert not isinstance(newer, CorruptCheckpointError) and "has format 2, this nanochat reads 1" in str(newer)
    other = error({"other": "program"})
    assert "metadata cannot be read (KeyError 'format'); there is no other step" in str(other)


@pytest.mark.parametrize("copy", [True, False])
def test_step_under_another_number_is_refused_and_kept(tmp_path: Path, copy: bool) -> None:
    manager = save_steps(tmp_path, 1)
    (shutil.copytree if copy else shutil.move)(tmp_path / "1", tmp_path / "2")
    expected = f"^{re.escape(str(tmp_path / '2'))} was renamed or copied: it holds step 1; rename it"
    for read in (checkpoint.load_params, lambda folder: checkpoint.restore(folder, full_state(2))):
        with pytest.raises(UserError, match=expected):
            read(tmp_path)
    with pytest.raises(UserError, match=expected):
        checkpoint.save(manager, full_state(2), {})
    checkpoint.close(manager)
    shutil.copytree(tmp_path / "2", tmp_path / "03")  # not a number of orbax's
    assert checkpoint.steps(tmp_path) == ([1, 2] if copy else [2])
    assert_same(checkpoint.restore(tmp_path, full_state(1), 1)[0], full_state(1)) if copy else None


@pytest.mark.parametrize(
    "content", ['{"val/bpb', "[" * 100_000, '{"val/bpb": "low"}', '{"val/bpb": 1%s}' % ("0" * 400), "7"]
)
def test_corrupt_metrics_file_is_reported_when_the_folder_is_opened(tmp_path: Path, content: str) -> None:
    manager = checkpoint.open_manager(tmp_path)
    checkpoint.save(manager, full_state(1), {}, metrics={"val/bpb": 1})
    checkpoint.close(manager)
    (tmp_path / "1" / "metrics" / "metrics").write_text(content)
    with pytest.raises(UserError, match=r"metrics/metrics cannot be read"):
        checkpoint.open_manager(tmp_path)
    (tmp_path / "1" / "meta" / "metadata").write_text(content)
    with pytest.raises(CorruptCheckpointError, match="metadata cannot be read"):
        checkpoint.load_params(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "7"])
def test_corrupt_file_of_orbax_is_named(tmp_path: Path, content: str) -> None:
    checkpoint.close(save_steps(tmp_path, 1))
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(UserError, match=r"a _CHECKPOINT_METADATA in it is corrupt .*; delete that file"):
        checkpoint.open_manager(tmp_path)


def fingerprint(x: torch.Tensor, offsets: Sequence[int] | None = None) -> int:
    return int(integrity.checksum(x, offsets)) % 2**64


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=g).bool()
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=g, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def test_checksum_format_is_stable() -> None:
    assert fingerprint(torch.arange(6, dtype=torch.float32).reshape(2, 3)) == 281522305708851200
    assert fingerprint(torch.arange(5)) == 13714906072585597492


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksums_of_shards_add_up(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    for shape in [(), (1,), (7,), (5, 9), (4, 3, 5), (2, 1, 3, 4), (0, 3)]:
        x = random_tensor(shape, dtype)
        whole = fingerprint(x)
        pieces = [(x, [0] * x.ndim)]
        for dim in range(x.ndim):  # split every dimension at up to three uneven positions
            split = []
            for piece, offsets in pieces:
                edges = sorted({0, piece.shape[dim], *rng.integers(0, piece.shape[dim] + 1, 3).tolist()})
                for a, b in itertools.pairwise(edges):
                    split.append((piece.narrow(dim, a, b - a), [o + a * (d == dim) for d, o in enumerate(offsets)]))
            pieces = split or pieces
        assert sum(fingerprint(p, o) for p, o in pieces) % 2**64 == whole, shape
        assert sum(fingerprint(p.contiguous(), o) for p, o in pieces) % 2**64 == whole, shape


def test_checksums_do_not_depend_on_chunking() -> None:
    x = random_tensor((3001, 1009), torch.int32)  # several uneven chunks
    rows = [fingerprint(x[a : a + 100], [a, 0]) for a in range(0, 3001, 100)]
    columns = [fingerprint(x[:, a : a + 500], [0, a]) for a in range(0, 1009, 500)]
    assert sum(rows) % 2**64 == sum(columns) % 2**64 == fingerprint(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksums_detect_every_flipped_bit(dtype: torch.dtype) -> None:
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
def test_checksums_detect_exchanged_elements_rows_and_columns(x: torch.Tensor) -> None:
    whole = fingerprint(x)
    changed = [x.flip(0), x.roll(1, 1), -x] + [x.T] * (not torch.equal(x, x.T))
    for i, j in itertools.combinations(range(8), 2):
        order, elements = list(range(8)), x.clone()
        order[i], order[j] = j, i
        elements[i, i], elements[i, j] = x[i, j], x[i, i]
        changed += [x[order], x[:, order], elements]
    assert whole not in map(fingerprint, changed)


@pytest.mark.gpu
def test_checksums_are_equal_on_cuda() -> None:
    for leaf in [*tree.leaves(full_state(1)), random_tensor((5000, 4001), torch.bfloat16)]:
        assert fingerprint(leaf) == fingerprint(leaf.cuda())
