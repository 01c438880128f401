"""The loader against a plain reference, over ranks, over resumes, with bad shards, caches and threads."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from experiments import bench_data
from nanochat import distributed
from nanochat.config import UserError, override
from nanochat.data import DataConfig, Tokenizer, embedded, packing
from nanochat.data import loader as dataloader
from nanochat.data.loader import LoaderState
from nanochat.data.sources import CorruptShardError

TOK = Tokenizer(tuple(bytes([i]) for i in range(256)))
OTHER_TOK = Tokenizer((*TOK.tokens, b"ab"))
BOS = 256
Item = tuple[dict[str, torch.Tensor], LoaderState, dict[str, float]]


pytestmark = pytest.mark.usefixtures("base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training shards of four blocks of up to ten documents, of 0 to 60 letters, and one to validate."""
    random.seed(1)
    shards = [[text(random.choice([0, 5, 20, 60])) for _ in range(37)] for _ in range(4)]
    return write(tmp_path / "data", shards)


def text(length: int) -> str:
    return "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))


def write(folder: Path, shards: list[list[str]], block_docs: int = 10) -> Path:
    folder.mkdir()
    for i, texts in enumerate(shards):
        embedded.write_shard(folder / f"shard_{i:05d}.parquet", texts, row_group_docs=block_docs)
    return folder


def texts_of(folder: Path) -> list[list[str]]:
    return [pq.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


def loader(folder: Path, *, rows: int = 4, length: int = 24, tok: Tokenizer = TOK, **options: Any) -> Iterator[Item]:
    """A loader over a small buffer; config fields and arguments of `batches` alike as options."""
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    config = {"source": str(folder), "buffer_docs": 8, "tokenizer_threads": 2}
    config |= {name: value for name, value in options.items() if name in fields}
    arguments = {"split": "train", "seed": 0} | {n: v for n, v in options.items() if n not in fields}
    return dataloader.batches(DataConfig(**config), tok, rows_per_step=rows, sequence_len=length, **arguments)


def take(count: int, stream: Iterator[Item]) -> list[Item]:
    items = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return items


def rows_of(items: list[Item]) -> np.ndarray:
    """All rows of T + 1 tokens, in order; the targets have to be the inputs shifted by one."""
    assert all(torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1]) for batch, _, _ in items)
    return np.concatenate([torch.cat([b["inputs"], b["targets"][:, -1:]], 1).numpy() for b, _, _ in items])


def plain(items: list[Item]) -> list[Any]:
    """Batches, states and statistics as values that compare with `==`."""
    return [
        ({n: x.tolist() for n, x in batch.items()}, {n: np.asarray(x).tolist() for n, x in state.items()}, stats)
        for batch, state, stats in items
    ]


def copied(state: LoaderState) -> LoaderState:
    """The state as it comes back from a checkpoint: through JSON and array files."""
    file = io.BytesIO()
    np.savez(file, tokens=state["tokens"], lengths=state["lengths"])
    arrays = np.load(io.BytesIO(file.getvalue()), allow_pickle=False)
    position = json.loads(json.dumps(state["position"]))
    return LoaderState(position=position, tokens=arrays["tokens"], lengths=arrays["lengths"])


def test_rows_are_the_packed_documents_in_the_order_of_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataloader, "CHUNK_CHARS", 50)  # several chunks of a block are tokenized at the same time
    docs = [[BOS, *t.encode()] for shard in texts_of(folder)[:3] for t in shard if t]
    stream = packing.plan(((len(doc), doc) for doc in itertools.cycle(docs)), 25, 8)
    rows = list(itertools.islice(stream, 400))
    cut = sum(row.cropped_tokens for row in rows)
    items = take(100, loader(folder, shuffle=False))
    expected = [[token for doc, start, end in row.pieces for token in doc[: end - start]] for row in rows]
    assert rows_of(items).tolist() == expected
    assert all(x.dtype == torch.int64 and x.shape == (4, 24) and x.is_contiguous() for x in items[0][0].values())
    assert items[-1][2]["epoch"] > 3, "the test should run over the end of an epoch"
    assert items[-1][2]["tokens_cut"] == cut
    assert items[-1][2]["tokens_packed"] == 400 * 25
    assert items[-1][2]["tokens_cut_fraction"] == cut / (cut + 400 * 25)


def test_large_vocabulary_uses_32_bit_tokens(folder: Path) -> None:
    big = Tokenizer((*TOK.tokens, *(b"~" + i.to_bytes(4, "big") for i in range(2**16))))
    row = rows_of(take(1, loader(folder, tok=big)))[0]
    small = rows_of(take(1, loader(folder)))[0]
    assert row[0] == big.bos > 2**16 and (row[row < 256] == small[small < 256]).all()


def test_every_epoch_permutes_shards_blocks_and_documents(tmp_path: Path) -> None:
    # Documents that fill a row each, so that rows come in the order of the documents: 3 shards of 5, 7, 9 blocks.
    ids, total = itertools.count(), 4 * (5 + 7 + 9)
    shards = [[f"{next(ids):09d}" for _ in range(4 * blocks)] for blocks in (5, 7, 9, 1)]
    source = write(tmp_path / "whole", shards, block_docs=4)

    def read(**options: Any) -> Iterator[list[int]]:
        for item in loader(source, rows=total, length=9, **options):
            yield [int(bytes(row[1:].tolist())) for row in rows_of([item])]

    epochs = list(itertools.islice(read(), 3))
    shard_orders, block_orders = set(), set()
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
        blocks = [epoch[i : i + 4] for i in range(0, total, 4)]
        assert all(max(block) // 4 == min(block) // 4 for block in blocks), "blocks are read one after another"
        assert any(block != sorted(block) for block in blocks), "documents of a block are not shuffled"
        shard_orders.add(tuple(s for s, _ in itertools.groupby((b[0] >= 20) + (b[0] >= 48) for b in blocks)))
        last = [block[0] // 4 for block in blocks if block[0] >= 48]
        assert last != sorted(last), "blocks are not shuffled"
        block_orders.add(tuple(last))
    assert len(shard_orders) > 1 and all(len(order) == 3 for order in shard_orders), "shards are read one after another"
    assert len(block_orders) == 3
    assert len({tuple(i for i in epoch if i < 4) for epoch in epochs}) > 1, "documents come in the same order again"
    assert next(read()) == epochs[0] != next(read(seed=1))
    assert next(read(shuffle=False)) == list(range(total))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_interleaved_rows(folder: Path, world_size: int) -> None:
    one = take(30, loader(folder, rows=8))
    ranks = [take(30, loader(folder, rows=8, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, whole in enumerate(one):
        for r in range(8):
            part = ranks[r % world_size][step][0]
            for name in ("inputs", "targets"):
                assert part[name].shape == (8 // world_size, 24)
                assert torch.equal(part[name][r // world_size], whole[0][name][r])
        for rank in ranks:
            assert plain([(whole[0], *rank[step][1:])]) == plain([whole]), "state and statistics are those of all ranks"


def test_resumes_after_every_batch_bit_for_bit(folder: Path) -> None:
    unbroken, state = take(60, loader(folder, token_cache=False)), None
    assert unbroken[-1][2]["epoch"] >= 2
    for expected in unbroken:
        item = take(1, loader(folder, state=state))
        assert plain(item) == plain([expected])
        state = copied(item[0][1])


def test_resumes_with_a_different_number_of_ranks_and_rows(folder: Path) -> None:
    unbroken = rows_of(take(20, loader(folder, rows=4)))
    state = take(5, loader(folder, rows=4, rank=1, world_size=2))[-1][1]
    assert np.array_equal(rows_of(take(7, loader(folder, rows=8, state=state)))[:56], unbroken[20:76])
    parts = [rows_of(take(5, loader(folder, rows=4, rank=r, world_size=4, state=state))) for r in range(4)]
    assert np.array_equal(np.stack(parts, 1).reshape(-1, 25), unbroken[20:40])


def test_resumes_from_a_state_of_the_first_version(tmp_path: Path) -> None:
    # Written before the loader was restructured: checkpoints of runs hold such states.
    golden = json.loads((Path(__file__).parents[1] / "golden" / "loader_state.json").read_text())
    for shard in range(4):
        lines = [
            "".join(chr(97 + (shard * 31 + i * 7 + j * j) % 26) for j in range((shard * 13 + i * 37) % 61))
            for i in range(2300)
        ]
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for saved in golden["states"]:
        tokens, lengths = np.array(saved["tokens"], np.uint16), np.array(saved["lengths"], np.int32)
        state = LoaderState(position=saved["position"], tokens=tokens, lengths=lengths)
        items = take(40, loader(tmp_path, rows=8, length=48, seed=7, buffer_docs=20, state=state))
        assert items[0][0]["inputs"][0].tolist() == saved["next_inputs_row"]
        data = b"".join(batch[name].numpy().tobytes() for batch, _, _ in items for name in ("inputs", "targets"))
        assert hashlib.sha256(data).hexdigest() == saved["next_40_sha256"]
        assert items[-1][2] == saved["stats_after_40"]
        assert items[-1][1]["position"].keys() == saved["position"].keys()


def test_state_holds_at_most_a_row_of_each_document(tmp_path: Path) -> None:
    random.seed(2)
    source = write(tmp_path / "long", [[text(random.choice([3, 5000])) for _ in range(200)]] * 2, block_docs=50)
    state = take(20, loader(source))[-1][1]
    assert state["lengths"].max() == 5001 and len(state["tokens"]) <= 8 * 25
    assert state["tokens"].dtype == np.uint16 and state["lengths"].dtype == np.int32


def test_waiting_documents_do_not_keep_their_blocks_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(5)
    source = write(tmp_path / "blocks", [[text(random.choice([3, 9, 5000])) for _ in range(400)]] * 2)
    seen: list[weakref.ref[np.ndarray]] = []
    tokenize = dataloader.BlockReader._tokenize

    def watched(*arguments: Any) -> dataloader.TokenBlock:
        block = tokenize(*arguments)
        seen.append(weakref.ref(block.tokens))
        return block

    monkeypatch.setattr(dataloader.BlockReader, "_tokenize", watched)
    stream = loader(source, token_cache=False, buffer_docs=100, length=2000)
    for _ in range(10):
        next(stream)
    alive = sum(ref() is not None for ref in seen)
    assert len(seen) > 20 and alive <= 6, f"{alive} of {len(seen)} blocks are kept in memory"


def test_state_of_a_different_stream_is_refused(folder: Path) -> None:
    state = take(3, loader(folder))[-1][1]
    for message, option in {
        "seed was 0, is 5": {"seed": 5},
        "sequence_len was 24, is 32": {"length": 32},
        "data.buffer_docs was 8, is 9": {"buffer_docs": 9},
        "data.shuffle was True, is False": {"shuffle": False},
        "tokenizer was": {"tok": OTHER_TOK},
        "split was train, is val": {"split": "val"},
    }.items():
        with pytest.raises(UserError, match=message):
            loader(folder, state=state, **option)
    damaged = LoaderState(position=state["position"], tokens=state["tokens"][:-1], lengths=state["lengths"])
    with pytest.raises(UserError, match="corrupt"):
        loader(folder, state=damaged)
    state["position"]["doc"] = 11
    with pytest.raises(UserError, match=r"shard_\d+\.parquet has changed"):
        next(loader(folder, state=state))
    (folder / "shard_00001.parquet").unlink()
    with pytest.raises(UserError, match=r"data was 3 shards .*, is 2 shards"):
        loader(folder, state=state)


def test_data_can_be_moved(folder: Path, tmp_path: Path) -> None:
    unbroken = take(10, loader(folder))
    moved = folder.rename(tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    assert plain(take(5, loader(moved, state=unbroken[4][1]))) == plain(unbroken[5:])


def test_validation_is_unshuffled_and_starts_over_every_time(folder: Path, tmp_path: Path) -> None:
    first = rows_of(take(9, loader(folder, split="val", seed=1)))
    assert np.array_equal(first, rows_of(take(9, loader(folder, split="val", seed=2))))
    as_train = write(tmp_path / "val", [texts_of(folder)[3], ["x"]])
    assert np.array_equal(first, rows_of(take(9, loader(as_train, shuffle=False))))


def test_cached_batches_are_the_same(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uncached = plain(take(50, loader(folder, token_cache=False)))
    assert not (base / "tokens").exists()
    assert plain(take(50, loader(folder))) == uncached
    files = sorted((base / "tokens" / TOK.fingerprint[:16]).glob("*/*"))
    assert len(files) == 12 and all(file.suffix == ".tokens" for file in files)
    whole = [file.read_bytes() for file in files]
    monkeypatch.setattr(dataloader, "read_block", None)  # no shard is read
    assert plain(take(50, loader(folder))) == uncached
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    for i, file in enumerate(files):  # corrupt files are rewritten
        file.write_bytes([whole[i][:-3], b"", whole[i][:-1] + b"\xff\xff"][i % 3])
    assert plain(take(50, loader(folder))) == uncached
    assert [file.read_bytes() for file in files] == whole


def test_cache_depends_on_tokenizer_and_text(folder: Path) -> None:
    before = rows_of(take(20, loader(folder)))
    assert not np.array_equal(rows_of(take(20, loader(folder, tok=OTHER_TOK))), before)
    shutil.rmtree(folder)
    write(folder, [[text(20) for _ in range(37)] for _ in range(4)])
    assert plain(take(20, loader(folder))) == plain(take(20, loader(folder, token_cache=False)))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_shard_rewritten_with_the_same_size_and_time_is_tokenized_again(tmp_path: Path, suffix: str) -> None:
    before = ["a" * 20] * 2500
    after = [*before[:1700], "b" * 20, *before[1701:]]
    (tmp_path / "data").mkdir()
    stats = []
    for texts in (before, after):
        for name in ("a", "b"):
            path = tmp_path / "data" / f"{name}{suffix}"
            if suffix == ".parquet":
                pq.write_table(pa.table({"text": texts}), path, 1000, compression="none", use_dictionary=False)
            else:
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            os.utime(path, ns=(1, 1))  # as `cp -p` and `rsync -t` do
        stats.append((path.stat().st_size, path.stat().st_mtime_ns))
        rows = rows_of(take(1, loader(path.parent, rows=2500, length=20, shuffle=False, buffer_docs=1)))
        assert [bytes(row[1:].tolist()).decode() for row in rows] == texts
    assert stats[0] == stats[1]


@pytest.mark.parametrize("change", ["move", "touch"])
def test_tokens_of_moved_or_touched_files_are_reused(
    folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(take(30, loader(folder)))
    monkeypatch.setattr(dataloader, "read_block", lambda *_: pytest.fail("tokenized again"))
    folder = folder.rename(folder.with_name("moved")) if change == "move" else folder
    for path in folder.iterdir():
        path.touch()
    assert (rows_of(take(30, loader(folder))) == rows).all()


def test_ranks_tokenize_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(4)
    source = write(tmp_path / "more", [[text(20) for _ in range(200)] for _ in range(4)])
    alone = rows_of(take(10, loader(source, rows=8, token_cache=False)))
    monkeypatch.setattr(dataloader, "OTHER_RANK_SECONDS", 60)
    read, reads = dataloader.read_block, []

    def counted(shard: Any, index: int, column: str) -> list[str]:
        reads.append((shard.path.name, index))
        time.sleep(0.02)
        return read(shard, index, column)

    monkeypatch.setattr(dataloader, "read_block", counted)
    streams = [loader(source, rows=8, rank=rank, world_size=4) for rank in range(4)]
    with ThreadPoolExecutor(4) as ranks:
        results = [rows_of(items) for items in ranks.map(lambda stream: take(10, stream), streams)]
    assert np.array_equal(np.stack(results, 1).reshape(-1, 25), alone)
    assert len(reads) == len(set(reads)), "a block was tokenized twice"
    assert len(reads) < 60, "the test should end within the first epoch"


def damage(folder: Path, kind: str) -> Path:
    """Damage the second shard: the pages of its third block and not the footer, or cut it off."""
    path = folder / "shard_00001.parquet"
    start = pq.ParquetFile(path).metadata.row_group(2).column(0)
    offset = start.dictionary_page_offset or start.data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + start.total_compressed_size] = b"\xff" * start.total_compressed_size
    path.write_bytes(data if kind == "block" else data[:200])
    return path


@pytest.mark.parametrize("kind", ["block", "cut"])
def test_corrupt_shard_is_named_in_its_turn(folder: Path, kind: str) -> None:
    good = rows_of(take(30, loader(folder, shuffle=False)))
    path = damage(folder, kind)
    rows = []
    with pytest.raises(CorruptShardError, match=r"shard_00001\.parquet") as caught:
        for item in loader(folder, shuffle=False, rows=1):
            rows.append(item)
    assert caught.value.path == path
    assert len(rows) >= 10 and np.array_equal(rows_of(rows), good[: len(rows)])


@pytest.mark.parametrize("kind", ["block", "cut"])
def test_corrupt_shard_is_skipped_deterministically(
    folder: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second, third, val = texts_of(folder)
    damage(folder, kind)
    readable = write(tmp_path / "left", [first, second[: 20 if kind == "block" else 0], third, val])
    expected = rows_of(take(40, loader(readable, shuffle=False)))
    assert np.array_equal(rows_of(take(40, loader(folder, shuffle=False, skip_bad_shards=True))), expected)
    capfd.readouterr()
    unbroken = take(60, loader(folder, skip_bad_shards=True))
    assert unbroken[-1][2]["epoch"] >= 2
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and "shard_00001.parquet" in warnings[0]
    for done in range(1, 60, 6):
        state = copied(unbroken[done - 1][1])
        assert plain(take(60 - done, loader(folder, skip_bad_shards=True, state=state))) == plain(unbroken[done:])


@pytest.mark.parametrize("shards", [[["", ""]] * 3, [[]] * 3, [[], ["", "x"]]], ids=["blank", "no rows", "val only"])
def test_data_without_documents_is_an_error(tmp_path: Path, shards: list[list[str]]) -> None:
    source = write(tmp_path / "none", shards)
    with pytest.raises(UserError, match="no documents to read for split train"):
        next(loader(source))
    for path in source.iterdir():
        path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="no documents to read for split train"):
        next(loader(source, skip_bad_shards=True))


def test_one_short_document_is_enough(tmp_path: Path) -> None:
    rows = rows_of(take(3, loader(write(tmp_path / "one", [["ab"], ["cd"]]))))
    assert rows.reshape(-1)[:7].tolist() == [BOS, 97, 98, BOS, 97, 98, BOS] and rows.shape == (12, 25)


def test_invalid_settings_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="4 rows does not divide among 3 ranks"):
        loader(folder, world_size=3)
    for name in ("buffer_docs", "prefetch_batches", "tokenizer_threads"):
        with pytest.raises(UserError, match=f"{name}=0: must be at least 1"):
            loader(folder, **dict[str, Any]({name: 0}))
    with pytest.raises(UserError, match="sequence_len=0"):
        loader(folder, length=0)


def test_closing_ends_every_thread(folder: Path) -> None:
    before = threading.active_count()
    for ending in ("close", "forget", "unused"):
        stream = loader(folder)
        if ending != "unused":
            next(stream)
        if ending == "close":
            stream.close()  # type: ignore[attr-defined]
        del stream
        deadline = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before, ending


def test_closing_does_not_wait_for_started_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode_documents

    def slow(tok: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        time.sleep(0.2)
        return encode(tok, texts)

    monkeypatch.setattr(Tokenizer, "encode_documents", slow)
    monkeypatch.setattr(dataloader, "CHUNK_CHARS", 20)
    stream = loader(folder, token_cache=False, buffer_docs=1, rows=1, tokenizer_threads=1)
    next(stream)
    started = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 1.8, "a block takes two seconds"


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(folder: Path) -> None:
    on_cpu = take(50, loader(folder))
    on_gpu = [(b["inputs"], b["targets"]) for b, _, _ in take(50, loader(folder, device="cuda"))]
    for (inputs, targets), (batch, _, _) in zip(on_gpu, on_cpu):
        assert inputs.is_cuda and torch.equal(inputs.cpu(), batch["inputs"])
        assert torch.equal(targets.cpu(), batch["targets"])


def test_loader_benchmark_reports_speeds(folder: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["tokens=5000", "rounds=1", "rows=4", "sequence_len=64", "vocab_size=270", f"data.source={folder}"]
    bench_data.run(override(bench_data.config(), settings), distributed.init("cpu"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == "data" and result["config"]["vocab_size"] == 270
    speeds = {name: value for name, value in result.items() if name.endswith("_tokens_per_second")}
    assert len(speeds) == 4 and all(value > 0 for value in speeds.values())
    assert result["uncached_loaded_tokens_per_second"] > result["uncached_packed_tokens_per_second"]
    assert 0 < result["tokens_cut_fraction"] < 1
    assert list((base / "tokens").iterdir()) == [], "the cache of a tokenizer that is forgotten stays behind"
