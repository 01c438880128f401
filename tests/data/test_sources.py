"""Sources: shards and blocks of folders and single files, sources written on first use, and what is wrong with them."""

import dataclasses
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ranks

from nanochat.config import UserError
from nanochat.data import CorruptShardError, DataConfig, embedded, sources, tokenizer
from nanochat.data.sources import Shard


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give every test a base folder, and `datasets` a cache, of its own."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()]


def docs(start: int, stop: int) -> list[str]:
    return [f"document {i}, with é and 日本" for i in range(start, stop)]


def write(path: Path, texts: list[str], row_group_docs: int = 10) -> Path:
    """Write documents as parquet or jsonl, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), path, row_group_size=row_group_docs)
    else:
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def read_all(config: DataConfig) -> tuple[list[str], list[str]]:
    return list(sources.texts(config, "train")), list(sources.texts(config, "val"))


def test_parquet_shards_are_sorted_and_the_last_is_the_validation_split(tmp_path: Path):
    for i in (2, 0, 1):
        write(tmp_path / f"shard_{i:05d}.parquet", docs(100 * i, 100 * i + 25))
    (tmp_path / "shard_00009.parquet.part").write_bytes(b"half")
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    config = DataConfig(source=str(tmp_path))
    shards = sources.shards_of(config, "train")
    assert [shard.path.name for shard in shards] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert [sources.num_blocks(shard) for shard in shards] == [3, 3]
    assert sources.read_block(shards[1], 2, "text") == docs(120, 125)
    assert read_all(config) == (docs(0, 25) + docs(100, 125), docs(200, 225))
    with pytest.raises(IndexError):
        sources.read_block(shards[0], 3, "text")


def test_folder_of_jsonl_is_read_in_blocks_of_a_thousand_lines(tmp_path: Path):
    write(tmp_path / "a.jsonl", docs(0, 2500))
    write(tmp_path / "b.jsonl", docs(5000, 5010))
    config = DataConfig(source=str(tmp_path))
    [shard] = sources.shards_of(config, "train")
    assert sources.num_blocks(shard) == 3
    assert sources.read_block(shard, 1, "text") == docs(1000, 2000)
    assert read_all(config) == (docs(0, 2500), docs(5000, 5010))


def test_documents_without_text_are_skipped(tmp_path: Path):
    write(tmp_path / "a.parquet", ["one", "", "two"])
    pq.write_table(pa.table({"text": [None, "three"]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n\n{"text": null}\n{"text": ""}\n{"text": "five"}')
    assert read_all(DataConfig(source=str(tmp_path))) == (["one", "two", "three"], ["four", "five"])


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=["large", "view", "dict"]
)
@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "nested/a.parquet"])
def test_strings_of_every_type_are_read(tmp_path: Path, kind: pa.DataType, name: str):
    (tmp_path / "in" / "nested").mkdir(parents=True)
    columns = [pa.array(docs(0, 40)).cast(kind), range(40), range(40)]
    table = pa.table(columns, names=["body", "id", "id" if name == "a.parquet" else "nr"])
    pq.write_table(table, tmp_path / "in" / name)
    train, val = read_all(DataConfig(source=str(tmp_path / "in"), text_column="body"))
    assert sorted(train + val) == sorted(docs(0, 40)) and val


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ([[["a"], ["b"]]], "column 'text' holds list<element: string>, not text: set data.text_column"),
        ([[{"a": "b"}]], "column 'text' holds struct<a: string>, not text"),
        ([[b"a"]], "column 'text' holds binary, not text"),
        ([["a"], ["b"]], "two columns are named 'text': rename or delete one of them"),
        ([pa.array([b"a"] * 1001 + [b"\xff"]).view(pa.string())], "row 1002 is not UTF-8 (byte 0xff)"),
    ],
)
def test_column_that_is_not_text_is_named(tmp_path: Path, columns: list[Any], problem: str):
    path = tmp_path / "in" / "nested" / "a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns, names=["text"] * len(columns)), path, row_group_size=1000)
    with pytest.raises(UserError) as caught:
        read_all(DataConfig(source=str(path)))
    assert str(caught.value).startswith(f"{path}: {problem}")
    with pytest.raises(UserError, match=r"a.parquet: (row|two columns)"):
        read_all(DataConfig(source=str(tmp_path / "in")))


LINES = "".join(json.dumps({"text": text}) + "\n" for text in docs(0, 40))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", json.dumps([{"text": text} for text in docs(0, 40)])),
        ("a.json", json.dumps([{"text": text} for text in docs(0, 40)], indent=2)),
        ("a.json", LINES),
        ("a.tsv", "id\ttext\n" + "".join(f"2024-01-01\t{text}\n" for text in docs(0, 40))),
        ("2025-03-01 10:30, C:/all [1]*/a, b:c.jsonl", LINES),
        ("2025-03-01 10:30, C:/all [1]*/a, b:c.json", LINES),
    ],
)
def test_file_and_its_folder_are_read(tmp_path: Path, name: str, content: str | bytes):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for source in (path, path.parent, tmp_path / "in"):
        train, val = read_all(DataConfig(source=str(source)))
        assert sorted(train + val) == sorted(docs(0, 40)) and val


def test_text_files_are_documents(tmp_path: Path):
    texts = {f"{i}/{i}.TXT": f"Dear {i},\n\n    indented\nEnd." for i in range(5)}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text.replace("\n", "\r\n"))
    train, val = read_all(DataConfig(source=str(tmp_path)))
    assert (val, train) == ([texts.pop("1/1.TXT")], list(texts.values()))
    with pytest.raises(UserError, match=r"two documents.* \(a text file of up to 10,000 characters is one\)"):
        read_all(DataConfig(source=str(tmp_path / "0" / "0.TXT")))
    long = "A line.\n\n" * 3000
    (tmp_path / "0" / "0.TXT").write_text(long)
    train, val = read_all(DataConfig(source=str(tmp_path / "0" / "0.TXT")))
    assert "".join([train[0], *val, *train[1:]]) == long


@pytest.mark.parametrize(
    ("files", "unread", "train"),
    [
        (["a.jsonl", "b.JSONL", "c.jsonl", "d.csv.bz2", "e.txt", ".hidden"], "d.csv.bz2, e.txt", 80),
        (["a.jsonl", "b.jsonl", "sub/c.jsonl", "LICENSE"], "LICENSE, sub/c.jsonl", 40),
        (["x/train-0.jsonl", "x/test-0.jsonl", "README.md"], "README.md, x/test-0.jsonl", 39),
        (["x/a.jsonl.xz", "x/a.ndjson", "y/b.json"], "x/a.jsonl.xz", 79),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path: Path, files: list[str], unread: str, train: int, capsys):
    for name in files:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(LINES)
    assert len(read_all(DataConfig(source=str(tmp_path / "in")))[0]) == train
    assert capsys.readouterr().out.splitlines()[-1] == f"not read in {tmp_path / 'in'}: {unread}"


@pytest.mark.parametrize("link", ["linked.jsonl", "linked folder"])
def test_links_that_cannot_be_followed_are_named(tmp_path: Path, link: str, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "nested" / "a.json", docs(0, 40))
    (tmp_path / link).symlink_to(tmp_path / "gone" if link.endswith("jsonl") else tmp_path / "nested")
    for _ in range(2):  # the base folder, with what was converted, is in the source: it is not read
        train, val = read_all(DataConfig(source=str(tmp_path)))
        assert sorted(train + val) == sorted(docs(0, 40))
    output = capsys.readouterr().out
    assert f"not read in {tmp_path}: {link}" in output and output.count("writing") == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_deeply_nested_json_is_named_or_skipped(tmp_path: Path, name: str):
    data = f'{LINES}{{"text": {"[" * 100_000}\n'.encode()
    path = write(tmp_path / "in" / name, [])
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for other in "bc":
        write(path.parent / f"{other}{'.jsonl' if name == 'a.jsonl' else '.json'}", docs(50, 60))
    config = DataConfig(source=str(path.parent))
    with pytest.raises(CorruptShardError, match=r"line 41 is not valid JSON \(nested too deeply\)"):
        read_all(config)
    train, val = read_all(dataclasses.replace(config, skip_bad_shards=True))
    assert {*docs(50, 60)} <= {*train, *val}


def test_converted_file_with_the_same_size_and_time_is_read_again(tmp_path: Path):
    for first in (0, 50):
        path = write(tmp_path / "a.json", docs(first + 10, first + 50))
        os.utime(path, ns=(1, 1))
        train, val = read_all(DataConfig(source=str(path)))
        assert sorted(train + val) == docs(first + 10, first + 50)


@pytest.mark.parametrize("escape", [r"\ud83d", r"\ude00\ud83d", r"\uDBFF."])
def test_half_a_character_is_the_same_for_every_consumer(tmp_path: Path, escape: str):
    (tmp_path / "a.jsonl").write_text(f'{LINES}{{"text": "half {escape}"}}\n{{"text": "x"}}')
    train, val = read_all(DataConfig(source=str(tmp_path)))
    [half] = [text for text in train + val if text.startswith("half")]
    tok = tokenizer.train([half, *train], 300)
    assert "\ufffd" in half and tok.decode(tok.encode(half)) == half


@pytest.mark.parametrize("name", ["only.parquet", "only.jsonl"])
@pytest.mark.parametrize("count", [2, 19, 400, 5000])
def test_single_file_is_split(tmp_path: Path, name: str, count: int):
    path = write(tmp_path / name, docs(0, count))
    train, val = read_all(DataConfig(source=str(path)))
    assert (train, val) == read_all(DataConfig(source=str(tmp_path)))
    assert train + val == docs(0, count)
    assert 1 <= len(val) <= max(10, count // 20) or (count == 5000 and len(val) == 1000)  # jsonl: one block of five


def test_climbmix_needs_its_validation_shard(base: Path):
    write(base / "climbmix" / "shard_00000.parquet", docs(0, 5))
    with pytest.raises(UserError, match=r"shard_06542.parquet, the validation split, is missing.*--experiment=data"):
        sources.shards_of(DataConfig(), "train")
    write(base / "climbmix" / "shard_06542.parquet", docs(20, 30))
    assert read_all(DataConfig()) == (docs(0, 5), docs(20, 30))
    (base / "climbmix" / "shard_00000.parquet").unlink()
    with pytest.raises(UserError, match="holds only the validation shard"):
        sources.shards_of(DataConfig(), "train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere", "no such file or folder"),
        ("climbmx", "did you mean climbmix?"),
        ("hub:", "expected hub:<dataset>"),
        ("hub:a:b:c:d", "expected hub:<dataset>"),
        ("climbmix", "download them with `torchrun launch.py --experiment=data`"),
        ("{here}/empty", "the folder is empty"),
        ("{here}/x.docx", "expected a file of .parquet, .jsonl, .* found only .docx"),
        ("{here}/one.jsonl", "a single file needs two documents"),
        ("{here}/none.jsonl", "no documents to read for split train"),
        ("{here}/one.csv", "row 1 has 2 fields, the header 1"),
    ],
)
def test_source_without_documents_is_named(source: str, message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.docx").write_bytes(b"x")
    write(tmp_path / "one.jsonl", docs(0, 1))
    write(tmp_path / "none.jsonl", [])
    (tmp_path / "one.csv").write_text("text\nHello, world\n")
    with pytest.raises(UserError, match=message) as caught:
        read_all(DataConfig(source=source.format(here=tmp_path)))
    assert "\n" not in str(caught.value)


def test_truncated_or_corrupt_parquet_is_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "a.parquet", [f"{i}" * 50 for i in range(2000)], 500)
    write(tmp_path / "b.parquet", docs(0, 5))
    write(tmp_path / "c.parquet", docs(30, 35))
    good, config = path.read_bytes(), DataConfig(source=str(tmp_path))
    zeros = good[:100] + bytes(20_000) + good[20_100:]
    for content in (zeros, b"PAR1", good[: len(good) // 2], good[:-8] + b"\xff\xff\xff\x7fPAR1", b""):
        path.write_bytes(content)
        with pytest.raises(CorruptShardError, match=r"a.parquet: unreadable parquet .*bad_shards=true$") as caught:
            list(sources.texts(config, "train"))
        assert caught.value.path == path
    assert read_all(dataclasses.replace(config, skip_bad_shards=True)) == (docs(0, 5), docs(30, 35))
    assert "a.parquet" in capsys.readouterr().out
    with pytest.raises(CorruptShardError, match="No such file"):
        sources.num_blocks(Shard(tmp_path / "gone.parquet", "gone"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut of', "line 1003 is not valid JSON"),
        (b'"text"', "row 1003 is not a JSON object"),
        (b'{"text": 7}', "row 1003: 'text' holds int, not text"),
    ],
)
def test_invalid_line_is_named(tmp_path: Path, line: bytes, message: str):
    good = [json.dumps({"text": text}).encode() for text in docs(0, 1500)]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([*good[:1002], line, *good[1003:]]))
    shard = Shard(path, "bad")
    assert sources.read_block(shard, 0, "text") == docs(0, 1000)
    with pytest.raises(CorruptShardError, match=message):
        sources.read_block(shard, 1, "text")


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        ("eval train", "train", "eval"),
        ("dev test train", "train", "dev"),
        ("test-0-of-1 train-0-of-2 train-1-of-2", "train-0-of-2 train-1-of-2", "test-0-of-1"),
        ("test-0 train-0 train-1 validation-0 validation-1", "train-0 train-1", "validation-0 validation-1"),
        ("books DEV web", "books web", "DEV"),
        ("developers latest trains", "developers latest", "trains"),
        ("test_a test_b", "test_a", "test_b"),
    ],
)
def test_names_of_files_decide_what_validates(tmp_path: Path, names: str, train: str, val: str):
    for name in names.split():
        write(tmp_path / f"{name}.jsonl", docs(0, 2))
    for split, expected in zip(sources.SPLITS, (train, val)):
        shards = sources.shards_of(DataConfig(source=str(tmp_path)), split)
        assert [shard.path.stem for shard in shards] == expected.split()


def test_missing_text_column_does_not_make_a_shard_corrupt(tmp_path: Path):
    for path in (write(tmp_path / "a.parquet", docs(0, 5)), write(tmp_path / "b.jsonl", docs(0, 5))):
        with pytest.raises(UserError, match=r"no text column 'body', it has .*text.*: set data.text_column") as caught:
            sources.read_block(Shard(path, "x"), 0, "body")
        assert str(path) in str(caught.value) and not isinstance(caught.value, CorruptShardError)
    with pytest.raises(UserError, match="column 'id' holds int64, not text"):
        sources.read_block(Shard(tmp_path / "a.parquet", "x"), 0, "id")


def test_embedded_corpus_is_built_once(base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    config, few = DataConfig(source="embedded"), [(f"s{i}", f"text {i}") for i in range(500)]
    monkeypatch.setattr(embedded, "documents", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sources.shards_of(config, "train")
    assert folders(base / "embedded") == [], "a failed build leaves something"
    monkeypatch.setattr(embedded, "documents", lambda: few)
    train, val = read_all(config)
    assert sorted(train + val) == sorted(text for _, text in few) and val
    assert folders(base / "embedded") == [embedded.key()]
    assert capfd.readouterr().out.count("writing the embedded corpus") == 2


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


def check_written(config: DataConfig, count: int, base: Path) -> None:
    """Assert that every hundredth document validates, and that the shards are written only once."""
    texts = docs(0, count)
    assert read_all(config) == ([text for i, text in enumerate(texts) if i % 100 != 1], texts[1::100])
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
    datasets.DatasetDict({"one": rows, "two": rows}).save_to_disk(str(tmp_path / "others"))
    with pytest.raises(UserError, match="no split train; name one of one, two"):
        sources.shards_of(DataConfig(source=str(tmp_path / "others")), "train")
    check_written(DataConfig(source=str(tmp_path / "others" / "two")), 350, base)


def test_csv_file_and_folder(tmp_path: Path, base: Path):
    folder = tmp_path / "tables"
    folder.mkdir()
    datasets.Dataset.from_dict({"body": docs(0, 150), "n": range(150)}).to_csv(str(folder / "train.csv"))
    config = DataConfig(source=str(folder), text_column="body")
    check_written(config, 150, base)
    check_written(dataclasses.replace(config, source=str(folder / "train.csv")), 150, base)
    with pytest.raises(UserError, match=r"no text column 'text', it has .*body"):
        sources.shards_of(DataConfig(source=str(folder)), "train")
    numbers = list(sources.texts(dataclasses.replace(config, text_column="n"), "train"))
    assert numbers == [str(n) for n in range(150) if n % 100 != 1], "a string is read as it is"
    datasets.Dataset.from_dict({"body": docs(0, 220)}).to_csv(str(folder / "train.csv"))
    check_written(config, 220, base)  # a local source that changes is read again


def test_hub_source_passes_name_config_and_split(base: Path, monkeypatch: pytest.MonkeyPatch):
    load_dataset = mock.Mock(side_effect=lambda *_, **__: [{"text": text} for text in docs(0, 250)])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "SHARD_CHARS", 2000)
    config = DataConfig(source="hub:someone/something")
    check_written(config, 250, base)
    assert len(sources.shards_of(config, "train")) > 2, "large sources become several shards"
    check_written(DataConfig(source="hf:someone/something:small:test"), 250, base)
    assert load_dataset.call_args_list == [
        mock.call("someone/something", None, split="train", streaming=True),
        mock.call("someone/something", "small", split="test", streaming=True),
    ]


@pytest.mark.parametrize("after", [0, 50])
def test_unreachable_hub_leaves_nothing(base: Path, monkeypatch: pytest.MonkeyPatch, after: int):
    def rows(*_: Any, **__: Any) -> Any:
        for text in docs(0, after):
            yield {"text": text}
        raise ConnectionError("no route to the hub.\nIn detail: …")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    message = r"hub:x/y could not be loaded \(ConnectionError: no route to the hub\)"
    with pytest.raises(UserError, match=message):
        sources.shards_of(DataConfig(source="hub:x/y"), "train")
    assert folders(base / "hub") == []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "alone"}])
    with pytest.raises(UserError, match="needs at least two documents"):
        sources.shards_of(DataConfig(source="hub:x/y"), "train")


def test_unwritable_base_folder_is_named(base: Path):
    base.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written .*set NANOCHAT_BASE_DIR"):
        sources.shards_of(DataConfig(source="embedded"), "train")
