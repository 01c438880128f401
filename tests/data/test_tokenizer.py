"""Training, encoding against the tokenizers library, long runs of text, and the files on disk."""

import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

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
        rest = f". It's {i * 37} (see  §{i}),\n\n\tif x_{i} >= {i}.5:\n        y['k'] += 1\r\n🙂 "
        texts.append(" ".join(chosen) + rest)
    return texts


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer.train(sample_texts(), VOCAB)


def test_vocabulary_is_bytes_then_merges_then_specials(tok: Tokenizer):
    assert tok.vocab_size == VOCAB
    assert tok.tokens[:256] == tuple(bytes([i]) for i in range(256))
    assert len(set(tok.tokens)) == VOCAB - 9
    assert [tok.special(name) for name in SPECIALS] == list(range(VOCAB - 9, VOCAB))
    assert tok.bos == VOCAB - 9
    for token in tok.tokens[256:]:
        assert any(token[:i] in tok.tokens and token[i:] in tok.tokens for i in range(1, len(token)))
    with pytest.raises(KeyError, match="not a special token"):
        tok.special("<|eos|>")


def test_training_is_deterministic_across_processes(tok: Tokenizer):
    code = "from tests.data import test_tokenizer as t; print(t.tokenizer.train(t.sample_texts(), t.VOCAB).fingerprint)"
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
    assert tokenizer.train(["xq xq xq ab", "zxq"], 267).tokens[256:] == (b"xq", b" xq")  # the most frequent pairs


@pytest.fixture(scope="module")
def trained_bpe():
    return tokenizer._train_bpe(sample_texts(), VOCAB - 9)


@settings(max_examples=400, deadline=None)
@given(text=st.text() | st.text(alphabet="abdeinoprsuvz 0123456789'\n\r\t\u00a0.,!안녕日ß_é", max_size=200))
@example(text="  double  spaces \n\n\n and\r\n lines \t\t x")
@example(text="it's I'LL don't 12345 a1b2 _x__y 'S")
def test_tiktoken_encodes_like_tokenizers(tok: Tokenizer, trained_bpe, text: str):
    byte_of = {char: byte for byte, char in tokenizer.byte_chars().items()}
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


@pytest.mark.parametrize("odd", [[], ["half a \ud800 pair"]])
def test_documents_are_encoded_together_as_alone(odd: list[str]):
    texts = ["<|bos|> is text", "<|user_end|> too", "plain", "é 漢字 🎉", " x ", " " * 9000 + "x", "word " * 3000]
    texts += ["a" + "y" * 5000, "b " * 2000 + "y" * 9001 + " c", "\n" * 9001 + "x", "b" + " " * 9000 + "x", "\0", *odd]
    tok = Tokenizer((*(bytes([i]) for i in range(256)), b"or", b"wor", b"  ", b"    ", b"yy", b"\n\n"))
    docs = tok.encode_documents(texts)
    assert [doc.tolist() for doc in docs] == [[tok.bos, *tok.encode(text)] for text in texts]
    assert all(doc.dtype == np.uint32 for doc in docs) and tok.encode_documents([]) == []


@pytest.mark.parametrize("unit", ["a", " ", "\n", "\u3000", "é", "\x1c!", "ab "])
def test_long_run_is_encoded_quickly_and_exactly(tok: Tokenizer, unit: str):
    text = ("start " + unit * (1_000_000 // len(unit)) + " end")[:1_000_000]
    start = time.perf_counter()
    ids = tok.encode(text)
    assert time.perf_counter() - start < 30
    assert tok.decode(ids) == text


def longest_run(text: str) -> int:
    return max(map(len, re.findall(r"\s+|\S+", text)), default=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("a \n!"), st.integers(1, 20_000)), max_size=6))
def test_only_long_runs_are_split_and_every_character_is_kept(runs: list[tuple[str, int]]):
    text = "".join(char * count for char, count in runs)
    parts = list(tokenizer._split_long_runs(text))
    assert "".join(parts) == text
    assert all(longest_run(part) < 2 * tokenizer.RUN_CHARS for part in parts)
    assert len(parts) <= 1 or longest_run(text) >= tokenizer.RUN_CHARS


def test_files_round_trip(tok: Tokenizer, tmp_path: Path):
    folder = tmp_path / "a" / "tok"
    tokenizer.save(tok, folder)
    again = tokenizer.load(folder)
    assert again == tok and again.fingerprint == tok.fingerprint
    lengths = tokenizer.token_bytes(tok)
    assert (folder / "token_bytes.txt").read_text().split() == [str(n) for n in lengths]
    assert (lengths[:256] == 1).all() and (lengths[-9:] == 0).all()
    assert lengths[tok.encode(sample_texts()[3])].sum() == len(sample_texts()[3].encode())
    header, first, *_ = (folder / "tokenizer.txt").read_text().splitlines()
    assert json.loads(header)["specials"] == list(SPECIALS) and first == "AA== 0"


def test_fingerprint_differs_between_tokenizers(tok: Tokenizer):
    others = [
        Tokenizer((*tok.tokens[:-2], tok.tokens[-1], tok.tokens[-2])),
        Tokenizer(tok.tokens, pattern=r"\s+|\S+"),
        Tokenizer(tok.tokens, specials=("<|bos|>", "<|x|>")),
        Tokenizer(tok.tokens[:-1]),
    ]
    assert len({tok.fingerprint, *(other.fingerprint for other in others)}) == 5


# What is wrong -> (a change of the lines of the file, what is said about it)
CORRUPT: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "header": (lambda x: ["not json", *x[1:]], "line 1: JSONDecodeError"),
    "keys": (lambda x: ["{}", *x[1:]], "line 1: KeyError: 'format'"),
    "format": (lambda x: [x[0].replace(tokenizer.FORMAT, "other-9"), *x[1:]], "format 'other-9' is not supported"),
    "base64": (lambda x: [*x[:300], "!!! 299", *x[301:]], "line 301: "),
    "rank": (lambda x: [*x[:300], x[301], *x[301:]], "line 301: ValueError: expected the rank 299"),
    "twice": (lambda x: [*x[:400], f"{x[399].split()[0]} 399", *x[401:]], "do not match the header's fingerprint"),
    "short": (lambda x: [*x[:-4], ""], "the file is truncated: it has 697 of 700 tokens"),
    "cut": (lambda x: [*x[:-2], x[-2][:-1]], "line 691: .*the file is truncated"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_file_is_refused_with_its_line(tok: Tokenizer, tmp_path: Path, kind: str):
    tokenizer.save(tok, tmp_path)
    path = tmp_path / "tokenizer.txt"
    change, expected = CORRUPT[kind]
    path.write_text("\n".join(change(path.read_text().split("\n"))))
    with pytest.raises(UserError, match=expected) as caught:
        tokenizer.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_unusable_file_is_refused(tok: Tokenizer, tmp_path: Path):
    with pytest.raises(UserError, match=r"does not exist.*--experiment=tokenizer"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"line 1: UnicodeDecodeError.*train again"):
        tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        tokenizer.load(tmp_path / "tokenizer.txt")
    with pytest.raises(UserError, match=r"token_bytes.txt cannot be written: (File exists|Not a directory)"):
        tokenizer.save(tok, tmp_path / "tokenizer.txt")


BYTES = tuple(bytes([i]) for i in range(256))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": (*BYTES[:97], *BYTES[98:], b"xy")}, "the byte 0x61 is not a token"),  # tiktoken panics
        ({"tokens": BYTES[:255]}, "the byte 0xff is not a token"),
        ({"tokens": (*BYTES, b"xy", b"xy")}, "the token b'xy' is there twice"),
        ({"tokens": (*BYTES, b"")}, "a token is empty"),
        ({"pattern": "("}, "the pattern '(' is not supported"),
        ({"pattern": ""}, "the pattern '' is not supported"),  # tiktoken panics
        ({"pattern": r"\p{L}+"}, "is not supported"),  # loses all other text
        ({"pattern": r"(x+x+)+y|[\s\S]"}, "is not supported"),  # takes exponential time
        ({"specials": ()}, "the tokenizer has no <|bos|>"),
        ({"specials": SPECIALS[:-1]}, "the tokenizer has no <|output_end|>"),
        ({"specials": (*SPECIALS, "<|bos|>")}, "the token '<|bos|>' is there twice"),
        ({"specials": (*SPECIALS, "")}, "a token is empty"),
        ({"specials": (*SPECIALS, "\ud800")}, "UnicodeEncodeError"),
    ],
)
def test_tokenizer_that_loses_text_or_stops_the_library_is_refused(tmp_path: Path, fields: Any, message: str):
    tokenizer.save(Tokenizer(**{"tokens": BYTES, **fields}), tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.txt").write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1: RecursionError"):
        tokenizer.load(tmp_path)


def test_failed_save_keeps_the_old_files(tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer.save(tok, tmp_path)
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device"):
        tokenizer.save(Tokenizer(tok.tokens[:300]), tmp_path)
    assert tokenizer.load(tmp_path) == tok
