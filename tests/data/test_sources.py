import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ranks

from nanochat.config import UserError
from nanochat.data import CorruptShardError, DataConfig, embedded, sources
from nanochat.data.sources import Shard


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give every test a base folder, and `datasets` a cache, of its own."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def docs(start: int, stop: int) -> list[str]:
    return [f"document {i}, with é and 日本" for i in range(start, stop)]


def write_parquet(path: Path, texts: list[str], row_group_docs: int = 10, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts, "id": range(len(texts))}), path, row_group_size=row_group_docs)
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def read_all(shards: list[Shard], text_column: str = "text") -> list[str]:
    return [
        text
        for shard in shards
        for block in range(sources.num_blocks(shard))
        for text in sources.read_block(shard, block, text_column)
    ]


def both(config: DataConfig) -> tuple[list[str], list[str]]:
    return (
        read_all(sources.shards_of(config, "train"), config.text_column),
        read_all(sources.shards_of(config, "val"), config.text_column),
    )


# ---------------------------------------------------------------------------------------------------------------
# Folders


def test_parquet_shards_are_sorted_and_the_last_is_the_validation_split(tmp_path: Path):
    for i in (2, 0, 1):
        write_parquet(tmp_path / "data" / f"shard_{i:05d}.parquet", docs(100 * i, 100 * i + 25))
    (tmp_path / "data" / "shard_00009.parquet.part").write_bytes(b"half")
    (tmp_path / "data" / ".hidden.parquet").write_bytes(b"")
    config = DataConfig(source=str(tmp_path / "data"))
    shards = sources.shards_of(config, "train")
    assert [shard.path.name for shard in shards] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert [sources.num_blocks(shard) for shard in shards] == [3, 3]
    assert sources.read_block(shards[1], 2, "text") == docs(120, 125)
    train, val = both(config)
    assert train == docs(0, 25) + docs(100, 125) and val == docs(200, 225)
    with pytest.raises(IndexError):
        sources.read_block(shards[0], 3, "text")


def test_folder_of_jsonl_is_read_in_blocks_of_a_thousand_lines(tmp_path: Path):
    write_jsonl(tmp_path / "data" / "a.jsonl", docs(0, 2500))
    write_jsonl(tmp_path / "data" / "b.jsonl", docs(5000, 5010))
    config = DataConfig(source=str(tmp_path / "data"))
    [shard] = sources.shards_of(config, "train")
    assert sources.num_blocks(shard) == 3
    assert sources.read_block(shard, 1, "text") == docs(1000, 2000)
    assert both(config) == (docs(0, 2500), docs(5000, 5010))


def test_documents_without_text_are_skipped(tmp_path: Path):
    write_parquet(tmp_path / "data" / "a.parquet", ["one", "", "two"])
    pq.write_table(pa.table({"text": [None, "three"]}), tmp_path / "data" / "b.parquet")
    (tmp_path / "data" / "c.jsonl").write_text('{"text": "four"}\n\n{"text": null}\n{"text": ""}\n{"text": "five"}')
    train, val = both(DataConfig(source=str(tmp_path / "data")))
    assert train == ["one", "two", "three"] and val == ["four", "five"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_large_and_dictionary_strings_are_read(tmp_path: Path, kind: pa.DataType):
    for name in "ab":
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table({"body": pa.array(docs(0, 5)).cast(kind)}), tmp_path / "data" / f"{name}.parquet")
    assert both(DataConfig(source=str(tmp_path / "data"), text_column="body")) == (docs(0, 5), docs(0, 5))


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
@pytest.mark.parametrize("count", [2, 19, 400, 5000])
@pytest.mark.parametrize("lone", ["folder", "file"])
def test_single_file_is_split(tmp_path: Path, write, count: int, lone: str):
    path = write(tmp_path / "data" / f"only{'.parquet' if write is write_parquet else '.jsonl'}", docs(0, count))
    train, val = both(DataConfig(source=str(path if lone == "file" else path.parent)))
    assert train + val == docs(0, count)
    assert 1 <= len(val) <= max(10, count // 20) or (count == 5000 and len(val) == 1000)  # jsonl: one block of five


def test_single_file_with_one_document_is_refused(tmp_path: Path):
    path = write_parquet(tmp_path / "one.parquet", docs(0, 1))
    with pytest.raises(UserError, match="a single file needs two documents"):
        both(DataConfig(source=str(path)))


def test_fingerprint_changes_with_the_file(tmp_path: Path):
    path = write_parquet(tmp_path / "data" / "a.parquet", docs(0, 20))
    write_parquet(tmp_path / "data" / "b.parquet", docs(0, 20))
    config = DataConfig(source=str(path.parent))
    [before] = sources.shards_of(config, "train")
    assert sources.shards_of(config, "train") == [before]
    assert read_all([before]) == docs(0, 20)
    write_parquet(path, docs(50, 90))
    [after] = sources.shards_of(config, "train")
    assert after.fingerprint != before.fingerprint
    assert read_all([after]) == docs(50, 90)  # nothing that was remembered about the old file is used


# ---------------------------------------------------------------------------------------------------------------
# Mistakes


def test_missing_sources_are_named(tmp_path: Path, base: Path):
    for source, expected in [
        (str(tmp_path / "nowhere"), "no such file or folder"),
        ("climbmx", "did you mean climbmix?"),
        ("hub:", "expected hub:<dataset>"),
        ("hub:a:b:c:d", "expected hub:<dataset>"),
        ("climbmix", "download them with `torchrun launch.py --experiment=data`"),
    ]:
        with pytest.raises(UserError, match=expected) as caught:
            sources.shards_of(DataConfig(source=source), "train")
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        sources.shards_of(DataConfig(source=str(tmp_path / "empty")), "train")


def test_climbmix_needs_its_validation_shard(base: Path):
    write_parquet(base / "climbmix" / "shard_00000.parquet", docs(0, 5))
    write_parquet(base / "climbmix" / "shard_00001.parquet", docs(5, 9))
    with pytest.raises(UserError, match=r"shard_06542.parquet, the validation split, is missing.*--experiment=data"):
        sources.shards_of(DataConfig(), "train")
    write_parquet(base / "climbmix" / "shard_06542.parquet", docs(20, 30))
    assert both(DataConfig()) == (docs(0, 9), docs(20, 30))
    (base / "climbmix" / "shard_00000.parquet").unlink()
    (base / "climbmix" / "shard_00001.parquet").unlink()
    with pytest.raises(UserError, match="holds only the validation shard"):
        sources.shards_of(DataConfig(), "train")


def corrupt_shard(folder: Path, name: str, content: bytes) -> Shard:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return Shard(path, f"{name}:{len(content)}")


def test_truncated_or_corrupt_parquet_is_named(tmp_path: Path):
    good = write_parquet(tmp_path / "good.parquet", [f"{i}" * 50 for i in range(2000)], 500).read_bytes()
    for content in (b"", b"PAR1", good[: len(good) // 2], good[:-8] + b"\xff\xff\xff\x7fPAR1"):
        with pytest.raises(CorruptShardError, match="unreadable parquet") as caught:
            read_all([corrupt_shard(tmp_path, "bad.parquet", content)])
        assert caught.value.path == tmp_path / "bad.parquet"
        message = str(caught.value)
        assert str(caught.value.path) in message and "data.skip_bad_shards=true" in message and "\n" not in message
    with pytest.raises(CorruptShardError):
        read_all([corrupt_shard(tmp_path, "zeros.parquet", good[:100] + bytes(20_000) + good[20_100:])])
    with pytest.raises(CorruptShardError):
        sources.num_blocks(Shard(tmp_path / "gone.parquet", "gone"))


@pytest.mark.parametrize(
    "line, expected",
    [
        (b"{'text': 1}", "line 1003 is not valid JSON"),
        (b'{"text": "cut of', "line 1003 is not valid JSON"),
        (b'"text"', "line 1003 is not a JSON object"),
        (b'{"text": 7}', "line 1003: 'text' is not text"),
        (b'{"text": "\xff"}', "line 1003 is not valid JSON"),
    ],
)
def test_invalid_line_is_named(tmp_path: Path, line: bytes, expected: str):
    good = [json.dumps({"text": text}).encode() for text in docs(0, 1500)]
    shard = corrupt_shard(tmp_path, "bad.jsonl", b"\n".join([*good[:1002], line, *good[1003:]]))
    assert sources.read_block(shard, 0, "text") == docs(0, 1000)
    with pytest.raises(CorruptShardError, match=expected) as caught:
        sources.read_block(shard, 1, "text")
    assert caught.value.path == shard.path and "\n" not in str(caught.value)


def test_missing_text_column_does_not_make_a_shard_corrupt(tmp_path: Path):
    a = write_parquet(tmp_path / "data" / "a.parquet", docs(0, 5))
    b = write_jsonl(tmp_path / "data" / "b.jsonl", docs(0, 5))
    for path in (a, b):
        with pytest.raises(UserError, match=r"no text column 'body', it has .*text.*: set data.text_column") as caught:
            sources.read_block(Shard(path, "x"), 0, "body")
        assert str(path) in str(caught.value) and not isinstance(caught.value, CorruptShardError)
    with pytest.raises(UserError, match="column 'id' holds int64, not text"):
        sources.read_block(Shard(a, "x"), 0, "id")


# ---------------------------------------------------------------------------------------------------------------
# Sources that are written as shards on first use


def test_embedded_corpus_is_built_once(base: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    few = [(f"s{i}", f"text {i}") for i in range(500)]
    calls = []
    monkeypatch.setattr(embedded, "documents", lambda: calls.append(1) or few)
    config = DataConfig(source="embedded")
    train, val = both(config)
    assert calls == [1]
    assert sorted(train + val) == sorted(text for _, text in few) and val
    assert sources.folder_of(config) == base / "embedded" / embedded.key()
    assert "writing the embedded corpus" in capfd.readouterr().out
    assert [path.name for path in (base / "embedded").iterdir() if path.is_dir()] == [embedded.key()]


def test_failed_build_leaves_nothing_and_can_be_repeated(base: Path, monkeypatch: pytest.MonkeyPatch):
    def fails():
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "documents", fails)
    with pytest.raises(KeyboardInterrupt):
        sources.shards_of(DataConfig(source="embedded"), "train")
    assert [path for path in (base / "embedded").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(embedded, "documents", lambda: [(f"{i}", f"text {i}") for i in range(99)])
    assert sources.shards_of(DataConfig(source="embedded"), "train")


def build_slowly(folder: Path) -> None:
    def build(target: Path) -> None:
        time.sleep(0.5)
        (target / "x").write_text("x")

    sources.build_once(folder, "x", build)
    assert (folder / "x").exists()


@pytest.mark.slow
def test_concurrent_processes_build_once(tmp_path: Path):
    folder = tmp_path / "built"
    with ranks.start(1, build_slowly, folder) as first, ranks.start(1, build_slowly, folder) as second:
        finished = [*first.wait(60), *second.wait(60)]
    assert [process.code for process in finished] == [0, 0], finished
    assert sorted("writing x" in process.out for process in finished) == [False, True]


def check_written(config: DataConfig, count: int, base: Path):
    train, val = both(config)
    texts = docs(0, count)
    assert val == texts[1::100] and train == [text for i, text in enumerate(texts) if i % 100 != 1]
    folder = sources.folder_of(config)
    assert folder.parent == base / "hub"
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sources.folder_of(config) == folder
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_saved_dataset(tmp_path: Path, base: Path):
    rows = datasets.Dataset.from_dict({"text": docs(0, 350)})
    rows.save_to_disk(str(tmp_path / "saved"))
    check_written(DataConfig(source=str(tmp_path / "saved")), 350, base)
    datasets.DatasetDict({"test": rows.select(range(5)), "train": rows}).save_to_disk(str(tmp_path / "splits"))
    check_written(DataConfig(source=str(tmp_path / "splits")), 350, base)


def test_csv_file_and_folder(tmp_path: Path, base: Path):
    folder = tmp_path / "tables"
    folder.mkdir()
    datasets.Dataset.from_dict({"body": docs(0, 150), "n": range(150)}).to_csv(str(folder / "train.csv"))
    config = DataConfig(source=str(folder), text_column="body")
    check_written(config, 150, base)
    check_written(dataclasses.replace(config, source=str(folder / "train.csv")), 150, base)
    with pytest.raises(UserError, match=r"no text column 'text', it has .*body"):
        sources.shards_of(DataConfig(source=str(folder)), "train")
    with pytest.raises(UserError, match="column 'n' is not text"):
        sources.shards_of(dataclasses.replace(config, text_column="n"), "train")


def test_local_source_that_changes_is_read_again(tmp_path: Path):
    path = tmp_path / "data.csv"
    datasets.Dataset.from_dict({"text": docs(0, 10)}).to_csv(str(path))
    first = sources.folder_of(DataConfig(source=str(path)))
    datasets.Dataset.from_dict({"text": docs(0, 20)}).to_csv(str(path))
    second = sources.folder_of(DataConfig(source=str(path)))
    assert first != second
    train, val = both(DataConfig(source=str(path)))
    assert len(train) + len(val) == 20


def test_hub_source_passes_name_config_and_split(base: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(name, config=None, **options):
        calls.append((name, config, options))
        return datasets.Dataset.from_dict({"text": docs(0, 250)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_written(DataConfig(source="hub:someone/something"), 250, base)
    check_written(DataConfig(source="hf:someone/something:small:test"), 250, base)
    assert calls == [
        ("someone/something", None, {"split": "train", "streaming": True}),
        ("someone/something", "small", {"split": "test", "streaming": True}),
    ]


def test_large_sources_become_several_shards(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "SHARD_CHARS", 2000)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"text": text} for text in docs(0, 250)])
    config = DataConfig(source="hub:x")
    assert len(sources.shards_of(config, "train")) > 2
    check_written(config, 250, base)


@pytest.mark.parametrize("after", [0, 50])
def test_unreachable_hub_leaves_nothing(base: Path, monkeypatch: pytest.MonkeyPatch, after: int):
    def rows(*args: object, **options: object):
        for text in docs(0, after):
            yield {"text": text}
        raise ConnectionError("no route to the hub.\nIn detail: …")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(UserError) as caught:
        sources.shards_of(DataConfig(source="hub:someone/something"), "train")
    message = str(caught.value)
    assert "hub:someone/something could not be loaded (ConnectionError: no route to the hub)" in message
    assert "\n" not in message
    assert [path for path in (base / "hub").iterdir() if path.is_dir()] == []


def test_offline_hub_is_one_line(tmp_path: Path):
    """Without a network, and with `datasets` itself: one line, no traceback."""
    code = (
        "from nanochat.data import sources\n"
        "try:\n"
        "    sources.shards_of(sources.DataConfig(source='hub:none/such'), 'train')\n"
        "except sources.UserError as error:\n"
        "    print('ERROR', error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "NANOCHAT_BASE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("ERROR data.source=hub:none/such could not be loaded (") and "check the name" in last


def test_source_with_a_single_document_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"text": "alone"}])
    with pytest.raises(UserError, match="needs at least two documents"):
        sources.shards_of(DataConfig(source="hub:x"), "train")


def test_saved_splits_without_train_are_named(tmp_path: Path):
    rows = datasets.Dataset.from_dict({"text": docs(0, 5)})
    datasets.DatasetDict({"one": rows, "two": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="no split train; name one of one, two"):
        sources.shards_of(DataConfig(source=str(tmp_path / "splits")), "train")
    assert sources.shards_of(DataConfig(source=str(tmp_path / "splits" / "two")), "train")


def test_file_of_an_unknown_kind(tmp_path: Path):
    (tmp_path / "x.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"expected a folder or a file of .parquet, .jsonl, .csv"):
        sources.shards_of(DataConfig(source=str(tmp_path / "x.docx")), "train")


def test_unwritable_base_folder_is_named(base: Path):
    base.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written .*set NANOCHAT_BASE_DIR") as caught:
        sources.shards_of(DataConfig(source="embedded"), "train")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------


def test_texts_of_a_split_with_and_without_a_corrupt_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, start in (("a", 0), ("b", 10), ("c", 20), ("d", 30)):
        write_parquet(tmp_path / "data" / f"{name}.parquet", docs(start, start + 5))
    config = DataConfig(source=str(tmp_path / "data"))
    assert list(sources.texts(config, "train")) == docs(0, 5) + docs(10, 15) + docs(20, 25)
    assert list(sources.texts(config, "val")) == docs(30, 35)
    (tmp_path / "data" / "b.parquet").write_bytes(b"")
    with pytest.raises(CorruptShardError, match=r"b\.parquet"):
        list(sources.texts(config, "train"))
    skipping = dataclasses.replace(config, skip_bad_shards=True)
    assert list(sources.texts(skipping, "train")) == docs(0, 5) + docs(20, 25)
    assert "b.parquet" in capsys.readouterr().out
