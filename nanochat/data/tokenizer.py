"""Byte-level BPE, GPT-4 style: `tokenizers` trains the merges, tiktoken encodes.

On disk a tokenizer is plain text: `tokenizer.txt` holds a JSON header line and then a line `base64 rank` per token;
`token_bytes.txt` holds the length of every token in bytes.
"""

import base64
import collections
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from nanochat import jsonl
from nanochat.config import UserError, base_dir
from nanochat.text import reason

# GPT-4's pattern, but numbers are split into at most two digits, which suits small vocabularies.
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s+"""
)
PATTERNS = (PATTERN, PATTERN.replace("{1,2}", "{1,3}"))  # ours and GPT-4's
SPECIALS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
FORMAT = "nanochat-tokenizer-1"
TOKENS_FILE, BYTES_FILE = FILES = ("tokenizer.txt", "token_bytes.txt")
RUN_CHARS = 4096  # half the longest run of spaces, or of anything else, that tiktoken gets in one piece
TRAIN_COMMAND = "torchrun launch.py --experiment=tokenizer"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer.

    Attributes:
        tokens: the bytes of each trained token; its index is its id and its rank.
        pattern: the regular expression that splits text into pieces, whose borders no token crosses.
        specials: names of the special tokens; their ids follow those of `tokens`.
    """

    tokens: tuple[bytes, ...] = dataclasses.field(repr=False)
    pattern: str = PATTERN
    specials: tuple[str, ...] = SPECIALS

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "nanochat",
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={name: len(self.tokens) + i for i, name in enumerate(self.specials)},
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pattern, tokens and special tokens."""
        digest = hashlib.sha256(json.dumps([self.pattern, self.specials]).encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokens) + len(self.specials)

    @property
    def bos(self) -> int:
        """Id of <|bos|>, the first token of every document."""
        return self.special("<|bos|>")

    def special(self, name: str) -> int:
        """Return the id of a special token, e.g. `special("<|user_start|>")`; raises KeyError."""
        if name not in self.specials:
            raise KeyError(f"{name} is not a special token; there are {', '.join(self.specials)}")
        return len(self.tokens) + self.specials.index(name)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Text that spells a special token is encoded as plain text."""
        ids: list[int] = []
        for part in _split_long_runs(text):
            ids += self.encoding.encode_ordinary(part)  # a tenth faster than id by id
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """Return the ids of each text, computed on `num_threads` threads (None: one per core)."""
        threads = min(num_threads or os.cpu_count() or 1, len(texts))
        if threads <= 1:
            return [self.encode(text) for text in texts]
        # Several documents at a time: to hand over a short one takes as long as to encode it.
        size = max(1, len(texts) // (8 * threads))
        chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            return list(itertools.chain.from_iterable(pool.map(lambda chunk: list(map(self.encode, chunk)), chunks)))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each document, uint32, after <|bos|>.

        Most go to tiktoken as one text, joined by <|bos|>: it encodes what is between special tokens separately, and
        releases the interpreter lock while it works, so longer is better.
        """
        bos = "<|bos|>"
        is_joined = [bos not in text and list(_split_long_runs(text)) == [text] for text in texts]
        try:
            joined = "".join(bos + text for text, ok in zip(texts, is_joined) if ok)
            ids = self.encoding.encode_to_numpy(joined, allowed_special={bos}, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair somewhere, which `encode` replaces
            ids, is_joined = np.empty(0, np.uint32), [False] * len(texts)
        docs = iter(np.split(ids, np.flatnonzero(ids == self.bos)[1:]))
        return [
            next(docs) if ok else np.array([self.bos, *self.encode(text)], np.uint32)
            for text, ok in zip(texts, is_joined)
        ]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids`, special tokens as their names. Raises ValueError for an id out of range."""
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {wrong} is outside 0..{self.vocab_size - 1}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _split_long_runs(text: str) -> Iterator[str]:
    """Split `text` inside runs of spaces or of non-spaces that are too long for the regular expression.

    tiktoken fails on a million spaces in a row, and older releases take quadratic time for a million letters. A run of
    2 * RUN_CHARS fills an aligned chunk of RUN_CHARS, so it suffices to look at aligned chunks: the text is split
    after each one that is all space or has none. Texts without such runs are not split.
    """
    start = 0
    for end in range(RUN_CHARS, len(text) + 1, RUN_CHARS):
        chunk = text[end - RUN_CHARS : end]
        if chunk.isspace() or not (chunk[0].isspace() or chunk[-1].isspace() or len(chunk.split(None, 1)) > 1):
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def train(
    texts: Iterable[str], vocab_size: int, *, max_chars: int = 2_000_000_000, max_chars_per_doc: int = 10_000
) -> Tokenizer:
    """Train a tokenizer of `vocab_size` ids, special tokens included, on documents; deterministic.

    Of a document it reads at most `max_chars_per_doc` characters, so that a few long ones do not dominate.
    """
    least = 256 + len(SPECIALS)
    if vocab_size < least:
        raise UserError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone take {least}")
    bpe = _train_bpe(_limit(texts, max_chars, max_chars_per_doc), vocab_size - len(SPECIALS))
    # The 256 bytes, then the results of the merges in order of training; two merges may give one token.
    byte_of = {char: byte for byte, char in byte_chars().items()}
    tokens = {bytes([i]): None for i in range(256)}
    for merge in json.loads(bpe.to_str())["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        tokens[bytes(byte_of[char] for char in left + right)] = None
    tokenizer = Tokenizer(tuple(tokens))
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"the text has only enough distinct words for vocab_size={tokenizer.vocab_size}, not {vocab_size}: "
            "give more text or a smaller vocab_size"
        )
    return tokenizer


def _limit(texts: Iterable[str], max_chars: int, max_chars_per_doc: int) -> Iterator[str]:
    for text in texts:
        if max_chars <= 0:
            return
        text = text[: min(max_chars_per_doc, max_chars)]
        max_chars -= len(text)
        yield text


def _train_bpe(texts: Iterable[str], num_tokens: int) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=0,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return bpe


def byte_chars() -> dict[int, str]:
    """Return byte-level BPE's character for each byte: itself if printable Latin-1, else U+0100 and upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = itertools.count(256)
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the length of every token in bytes, int64 (vocab_size,), for bits per byte; 0 for special tokens."""
    lengths = [len(token) for token in tokenizer.tokens] + [0] * len(tokenizer.specials)
    return np.array(lengths, dtype=np.int64)


def check(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer that would lose text, or stop tiktoken, which panics for a missing byte.

    No test shows that a regular expression matches all text, and none in exponential time; so it has to be a known one.
    """
    if tokenizer.pattern not in PATTERNS:
        raise ValueError(f"the pattern {repr(tokenizer.pattern)[:100]} is not supported: use nanochat's or GPT-4's")
    counts = collections.Counter([*tokenizer.tokens, *tokenizer.specials])
    if missing := [i for i in range(256) if bytes([i]) not in counts]:
        raise ValueError(f"the byte {missing[0]:#04x} is not a token: text with it could not be encoded")
    if missing := [name for name in SPECIALS if name not in counts]:
        raise ValueError(f"the tokenizer has no {missing[0]}")
    if "" in counts or b"" in counts:
        raise ValueError("a token is empty")
    if twice := [token for token, count in counts.items() if count > 1]:
        raise ValueError(f"the token {repr(twice[0])[:100]} is there twice")


def default_dir() -> Path:
    return base_dir() / "tokenizer"


def save(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write tokenizer.txt and token_bytes.txt into `folder`, each atomically."""
    header = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "pattern": tokenizer.pattern,
        "specials": tokenizer.specials,
        "fingerprint": tokenizer.fingerprint,
    }
    lines = [json.dumps(header)]
    lines += [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokenizer.tokens)]
    jsonl.write_atomic(Path(folder) / BYTES_FILE, "".join(f"{n}\n" for n in token_bytes(tokenizer)))
    jsonl.write_atomic(Path(folder) / TOKENS_FILE, "".join(f"{line}\n" for line in lines))


def load(folder: Path | str) -> Tokenizer:
    """Load and verify the tokenizer that `save` wrote into `folder`; an error names file and line."""
    path, number, tokens = Path(folder) / TOKENS_FILE, 1, []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        header = json.loads(lines[0])
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r} is not supported, expected {FORMAT!r}")
        for number, line in enumerate(lines[1:-1], start=2):
            token, rank = line.split(" ")
            tokens.append(base64.b64decode(token, validate=True))
            if int(rank) != number - 2:
                raise ValueError(f"expected the rank {number - 2}")
        tokenizer = Tokenizer(tuple(tokens), header["pattern"], tuple(header["specials"]))
        if tokenizer.vocab_size != header["vocab_size"] or lines[-1]:
            raise ValueError(f"the file is truncated: it has {tokenizer.vocab_size} of {header['vocab_size']} tokens")
        number = 1
        if tokenizer.fingerprint != header["fingerprint"]:
            raise ValueError("the tokens do not match the header's fingerprint")
        check(tokenizer)
        tokenizer.encoding.encode_ordinary("")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train a tokenizer with `{TRAIN_COMMAND}`") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except Exception as error:  # tiktoken reports a bad pattern or token table as a bare ValueError or AssertionError
        problem = f"{path} line {number}: {type(error).__name__}: {reason(error)}"
        raise UserError(f"{problem}; corrupt or of another version: train again with `{TRAIN_COMMAND}`") from None
    return tokenizer
