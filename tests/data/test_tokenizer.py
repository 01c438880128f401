import base64
import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat.config import UserError
from nanochat.data import SPECIALS, Tokenizer, tokenizer

VOCAB = 700


def sample_texts() -> list[str]:
    """Return documents of invented words with the odds of natural text, numbers, code and other scripts."""
    draw = random.Random(0)
    syllables = ["ba", "co", "der", "in", "lo", "mi", "nu", "per", "sa", "th", "un", "ver", "zé", "안녕", "日本", "ß"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(800)]
    texts = []
    for i in range(300):
        chosen = draw.choices(words, weights=[1 / (k + 1) for k in range(len(words))], k=120)
        texts.append(
            " ".join(chosen) + f". It's {i * 37} (see  §{i}),\n\n\tif x_{i} >= {i}.5:\n        y['k'] += 1\r\n🙂 "
        )
    return texts


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.train(sample_texts(), VOCAB)


# ---------------------------------------------------------------------------------------------------------------
# Learning


def test_vocabulary_is_bytes_then_merges_then_specials(tok: Tokenizer):
    assert tok.vocab_size == VOCAB
    assert tok.tokens[:256] == tuple(bytes([i]) for i in range(256))
    assert len(set(tok.tokens)) == VOCAB - 9
    assert [tok.special(name) for name in SPECIALS] == list(range(VOCAB - 9, VOCAB))
    assert tok.bos == VOCAB - 9
    assert all(
        any(token[:i] in tok.tokens and token[i:] in tok.tokens for i in range(1, len(token)))
        for token in tok.tokens[256:]
    )
    with pytest.raises(KeyError, match="not a special token"):
        tok.special("<|eos|>")


def test_first_merge_is_the_most_frequent_pair():
    tok = tokenizer.train(["xq xq xq ab", "zxq"], 256 + 9 + 2)
    assert tok.tokens[256:] == (b"xq", b" xq")


def test_training_is_deterministic_across_processes(tok: Tokenizer):
    code = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from tests.data import test_tokenizer as t\n"
        "print(t.tokenizer.train(t.sample_texts(), t.VOCAB).fingerprint)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tok.fingerprint


def test_training_reads_no_more_than_its_limits():
    read = []

    def documents():
        for i in range(100):
            read.append(i)
            yield "abc" * 50

    tokenizer.train(documents(), 256 + 9 + 1, max_chars=100, max_chars_per_doc=30)
    assert len(read) == 5  # 30 + 30 + 30 + 10, and the one at which the reading stops
    late = ["ab" + "xy" * 500]
    assert tokenizer.train(late, 256 + 9 + 1, max_chars_per_doc=2).tokens[-1] == b"ab"


def test_vocabulary_too_small_or_too_large_is_refused():
    with pytest.raises(UserError, match=r"vocab_size=264 is too small.*265"):
        tokenizer.train(["some text"], 264)
    with pytest.raises(UserError, match=r"vocab_size=267, not 300"):
        tokenizer.train(["abc"], 300)
    assert tokenizer.train(["abc"], 265).encode("abc") == [97, 98, 99]


# ---------------------------------------------------------------------------------------------------------------
# Encoding and decoding


@pytest.fixture(scope="module")
def trained_bpe():
    return tokenizer._train_bpe(sample_texts(), VOCAB - 9)


@settings(max_examples=400, deadline=None)
@given(text=st.text() | st.text(alphabet="abdeinoprsuvz 0123456789'\n\r\t\u00a0.,!안녕日ß_é", max_size=200))
@example(text="  double  spaces \n\n\n and\r\n lines \t\t x")
@example(text="it's I'LL don't 12345 a1b2 _x__y 'S")
def test_tiktoken_encodes_like_tokenizers(tok: Tokenizer, trained_bpe, text: str):
    byte_of = {char: byte for byte, char in tokenizer._byte_chars().items()}
    expected = [bytes(byte_of[char] for char in token) for token in trained_bpe.encode(text).tokens]
    assert [tok.tokens[i] for i in tok.encode(text)] == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "bos", " ", "\n"])).map("".join))
def test_round_trip_and_no_specials_from_text(tok: Tokenizer, text: str):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode()
    assert all(i < len(tok.tokens) for i in ids)


def test_decoding_of_special_tokens_and_wrong_ids(tok: Tokenizer):
    assert tok.decode([tok.bos, *tok.encode("hi")]) == "<|bos|>hi"
    assert tok.decode([0xE4]) == "\ufffd"
    for wrong in (VOCAB, -1, 2**40):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside 0..{VOCAB - 1}"):
            tok.decode([97, wrong])


def test_batch_equals_single_encoding_for_any_number_of_threads(tok: Tokenizer):
    texts = [*sample_texts()[:40], "", "x" * 10_000]
    alone = [tok.encode(text) for text in texts]
    for threads in (None, 1, 2, 7):
        assert tok.encode_batch(texts, num_threads=threads) == alone
    assert tok.encode_batch([]) == []


@pytest.mark.parametrize("unit", ["a", " ", "\n", " \n", "\u3000", "!", "é", "7", "\x1c!", "ab ", "语"])
def test_long_run_is_encoded_quickly_and_exactly(tok: Tokenizer, unit: str):
    text = ("start " + unit * (1_000_000 // len(unit)) + " end")[:1_000_000]
    start = time.perf_counter()
    ids = tok.encode(text)
    assert time.perf_counter() - start < 10
    assert tok.decode(ids) == text


def test_ordinary_text_is_not_split(tok: Tokenizer):
    text = " ".join(sample_texts()) + " " + "q" * 3000 + " " * 3000 + "end"
    assert len(text) > 10 * tokenizer.RUN_CHARS
    assert list(tokenizer._split_long_runs(text)) == [text]
    assert tok.encode(text) == tok.encoding.encode_ordinary(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("a \n!"), st.integers(1, 20_000)), max_size=6))
def test_split_text_has_no_long_runs_and_keeps_every_character(runs: list[tuple[str, int]]):
    text = "".join(char * count for char, count in runs)
    parts = list(tokenizer._split_long_runs(text))
    assert "".join(parts) == text
    for part in parts:
        solid = max(map(len, part.split()), default=0)
        blank = max(map(len, "".join("x" if c.isspace() else " " for c in part).split()), default=0)
        assert max(solid, blank) < 2 * tokenizer.RUN_CHARS


# ---------------------------------------------------------------------------------------------------------------
# Files


def test_token_bytes(tok: Tokenizer):
    lengths = tokenizer.token_bytes(tok)
    assert lengths.shape == (VOCAB,) and lengths.dtype == np.int64
    assert (lengths[:256] == 1).all() and (lengths[-9:] == 0).all()
    text = sample_texts()[3]
    assert lengths[tok.encode(text)].sum() == len(text.encode())


def test_files_round_trip(tok: Tokenizer, tmp_path: Path):
    folder = tmp_path / "a" / "tok"
    tokenizer.save(tok, folder)
    again = tokenizer.load(folder)
    assert again == tok and again.fingerprint == tok.fingerprint
    assert again.encode("verin 안녕 <|bos|>") == tok.encode("verin 안녕 <|bos|>")
    lengths = (folder / "token_bytes.txt").read_text().splitlines()
    assert lengths == [str(n) for n in tokenizer.token_bytes(tok)]
    assert sorted(path.name for path in folder.iterdir()) == ["token_bytes.txt", "tokenizer.txt"]
    lines = (folder / "tokenizer.txt").read_text().splitlines()
    header = json.loads(lines[0])
    assert header["vocab_size"] == VOCAB and header["specials"] == list(SPECIALS)
    assert lines[1] == f"{base64.b64encode(bytes(1)).decode()} 0" and len(lines) == 1 + VOCAB - 9


def test_fingerprint_differs_between_tokenizers(tok: Tokenizer):
    others = [
        Tokenizer((*tok.tokens[:-2], tok.tokens[-1], tok.tokens[-2])),
        Tokenizer(tok.tokens, pattern=r"\s+|\S+"),
        Tokenizer(tok.tokens, specials=("<|bos|>", "<|x|>")),
        Tokenizer(tok.tokens[:-1]),
    ]
    assert len({tok.fingerprint, *(other.fingerprint for other in others)}) == 5


def corrupt(lines: list[str], how: str) -> str:
    if how == "header":
        lines[0] = "not json"
    elif how == "format":
        lines[0] = lines[0].replace(tokenizer.FORMAT, "other-9")
    elif how == "pattern":
        header = json.loads(lines[0])
        bad = Tokenizer(tuple(base64.b64decode(line.split()[0]) for line in lines[1:]), pattern="(")
        lines[0] = json.dumps({**header, "pattern": "(", "fingerprint": bad.fingerprint})
    elif how == "base64":
        lines[300] = "!!! 299"
    elif how == "rank":
        lines[300] = lines[301]
    elif how == "swap":
        a, b = (line.split()[0] for line in lines[400:402])
        lines[400:402] = [f"{b} 399", f"{a} 400"]
    elif how == "twice":
        lines[400] = f"{lines[399].split()[0]} 399"
    elif how == "short":
        del lines[-3:]
    elif how == "cut":
        return "\n".join(lines)[:-2]
    elif how == "empty":
        return ""
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "how, expected",
    [
        ("header", "line 1: expected a JSON header"),
        ("format", "format 'other-9' is not supported"),
        ("pattern", "line 1: tiktoken refuses it"),
        ("base64", "line 301: expected a token in base64 and the rank 299"),
        ("rank", "line 301: "),
        ("swap", "do not match the header's fingerprint"),
        ("twice", "do not match the header's fingerprint"),
        ("short", "ends after 688 of 691 tokens"),
        ("cut", "the file is truncated"),
        ("empty", "the file is truncated"),
    ],
)
def test_corrupt_file_is_refused_with_its_line(tok: Tokenizer, tmp_path: Path, how: str, expected: str):
    tokenizer.save(tok, tmp_path)
    path = tmp_path / "tokenizer.txt"
    path.write_text(corrupt(path.read_text().splitlines(), how))
    with pytest.raises(UserError, match=expected) as caught:
        tokenizer.load(tmp_path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message


def test_missing_or_unreadable_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"does not exist.*--experiment=tokenizer"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.load(tmp_path)


def test_unwritable_folder_is_named(tok: Tokenizer, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"token_bytes.txt cannot be written: (File exists|Not a directory)"):
        tokenizer.save(tok, tmp_path / "file")


def test_failed_save_keeps_the_old_files(tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer.save(tok, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, text: str, **options: str) -> None:
        path.write_bytes(text.encode()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        tokenizer.save(Tokenizer(tok.tokens[:300]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
