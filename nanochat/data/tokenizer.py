"""Byte-level BPE in the manner of GPT-4: `tokenizers` learns the merges, tiktoken encodes.

A tokenizer is a frozen value of three things: a split pattern, the learned tokens in order of rank, and the names
of the special tokens, whose ids follow the learned ones. On disk it is plain text: `tokenizer.txt` holds a JSON
header line and then one `base64 rank` line per token; `token_bytes.txt` holds the length of every token in bytes
(0 for specials), which turns a loss per token into bits per byte.
"""

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from nanochat.config import UserError, base_dir

# GPT-4's pattern, but numbers are cut into at most two digits: kinder to small vocabularies.
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s+"""
)
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
TOKENS_FILE, BYTES_FILE = FILES = ("tokenizer.txt", "token_bytes.txt")  # what `save` writes, all of it
RUN_CHARS = 4096
"""Half the longest run of spaces, or of anything else, that is handed to tiktoken in one piece."""
TRAIN_COMMAND = "torchrun launch.py --experiment=tokenizer"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer.

    Attributes:
        tokens: the learned tokens' bytes; a token's index is its id and its rank.
        pattern: the regular expression that cuts text into pieces which no token crosses.
        specials: names of the special tokens; their ids follow the learned ones.
    """

    tokens: tuple[bytes, ...] = dataclasses.field(repr=False)
    pattern: str = PATTERN
    specials: tuple[str, ...] = SPECIALS

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding that does the work."""
        return tiktoken.Encoding(
            "nanochat",
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={name: len(self.tokens) + i for i, name in enumerate(self.specials)},
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of pattern, ranks and specials: equal exactly for tokenizers that encode alike."""
        digest = hashlib.sha256(json.dumps([self.pattern, self.specials]).encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return len(self.tokens) + len(self.specials)

    @property
    def bos(self) -> int:
        """Id of <|bos|>, with which every document starts."""
        return self.special("<|bos|>")

    def special(self, name: str) -> int:
        """Return the id of a special token, e.g. `special("<|user_start|>")`; KeyError for an unknown name."""
        if name not in self.specials:
            raise KeyError(f"{name} is no special token; there are {', '.join(self.specials)}")
        return len(self.tokens) + self.specials.index(name)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Text that spells a special token is encoded as the plain text that it is."""
        ids: list[int] = []
        for part in _bounded(text):
            ids += self.encoding.encode_ordinary(part)
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """Return the ids of each text, computed on `num_threads` threads (None: one per core)."""
        threads = min(num_threads or os.cpu_count() or 1, len(texts))
        if threads <= 1:
            return [self.encode(text) for text in texts]
        # Runs of documents, not single ones: handing over a short one takes as long as encoding it.
        run = max(1, len(texts) // (8 * threads))
        runs = [texts[start : start + run] for start in range(0, len(texts), run)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(lambda part: [self.encode(text) for text in part], runs) for ids in part]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that `ids` stand for; specials give their names. ValueError for an id out of range."""
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {wrong} is outside 0..{self.vocab_size - 1}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _bounded(text: str) -> Iterator[str]:
    """Cut `text` where a run of spaces or of non-spaces is so long that the split would overflow its stack.

    tiktoken fails on a million spaces in a row, and older releases take quadratic time on a million letters. A run
    of 2 * RUN_CHARS fills an aligned chunk of RUN_CHARS, so looking at aligned chunks finds every one of them; the
    text is cut behind each chunk that is all space or has none. Texts without such runs stay whole.
    """
    if len(text) < RUN_CHARS:
        yield text
        return
    start = 0
    for end in range(RUN_CHARS, len(text) + 1, RUN_CHARS):
        chunk = text[end - RUN_CHARS : end]
        if chunk.isspace() or not (chunk[0].isspace() or chunk[-1].isspace() or len(chunk.split(None, 1)) > 1):
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def train(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_chars: int = 2_000_000_000,
    max_chars_per_doc: int = 10_000,
) -> Tokenizer:
    """Learn a tokenizer from documents. The same documents give the same tokenizer.

    Args:
        texts: the documents; read until they end or `max_chars` is reached.
        vocab_size: number of ids, the nine specials included.
        max_chars: characters to read in all.
        max_chars_per_doc: characters to read of one document, so that a few giants do not dominate.

    Raises:
        UserError: `vocab_size` has no room for 256 bytes and the specials, or the text is too small to fill it.
    """
    least = 256 + len(SPECIALS)
    if vocab_size < least:
        raise UserError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone take {least}")
    learner = _learn(_limited(texts, max_chars, max_chars_per_doc), vocab_size - len(SPECIALS))
    tokenizer = Tokenizer(_tokens_of(learner))
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"the text has only enough distinct words for vocab_size={tokenizer.vocab_size}, not {vocab_size}: "
            "give more text or a smaller vocab_size"
        )
    return tokenizer


def _learn(texts: Iterable[str], num_tokens: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of the `tokenizers` library with up to `num_tokens` tokens learned from `texts`."""
    learner = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"), _byte_level()]
    learner.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=0,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learner.train_from_iterator(texts, trainer=trainer)
    return learner


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _limited(texts: Iterable[str], max_chars: int, max_chars_per_doc: int) -> Iterator[str]:
    for text in texts:
        if max_chars <= 0:
            return
        text = text[: min(max_chars_per_doc, max_chars)]
        max_chars -= len(text)
        yield text


def _tokens_of(learner: tokenizers.Tokenizer) -> tuple[bytes, ...]:
    """Return the 256 bytes in order, then the merges' results in the order in which they were learned."""
    byte_of = {char: byte for byte, char in _byte_chars().items()}
    tokens = {bytes([i]): None for i in range(256)}
    for merge in json.loads(learner.to_str())["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        tokens[bytes(byte_of[char] for char in left + right)] = None  # two merges may give one token
    return tuple(tokens)


def _byte_chars() -> dict[int, str]:
    """Return the printable character that stands for each byte in byte-level BPE.

    Printable Latin-1 stands for itself, the other 68 bytes are numbered upwards from U+0100.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = itertools.count(256)
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the length of every token in bytes, int64 (vocab_size,); 0 for the specials."""
    lengths = [len(token) for token in tokenizer.tokens] + [0] * len(tokenizer.specials)
    return np.array(lengths, dtype=np.int64)


def default_dir() -> Path:
    """Return the folder in which the tokenizer lies unless an experiment says otherwise."""
    return base_dir() / "tokenizer"


def save(tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write tokenizer.txt and token_bytes.txt into `folder`, each in one piece or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    header = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "pattern": tokenizer.pattern,
        "specials": tokenizer.specials,
        "fingerprint": tokenizer.fingerprint,
    }
    lines = [json.dumps(header)]
    lines += [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokenizer.tokens)]
    _write(Path(folder) / BYTES_FILE, "".join(f"{n}\n" for n in token_bytes(tokenizer)))
    _write(Path(folder) / TOKENS_FILE, "".join(f"{line}\n" for line in lines))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def load(folder: Path | str) -> Tokenizer:
    """Read the tokenizer that `save` wrote into `folder`, checking all of it.

    Raises:
        UserError: there is none, or the file is damaged (with file and line).
    """
    path = Path(folder) / TOKENS_FILE
    first, *lines = _read_lines(path)
    header = _header(path, first)
    tokens: list[bytes] = []
    for number, line in enumerate(lines, start=2):
        try:
            encoded, rank = line.split(" ")
            token = base64.b64decode(encoded, validate=True)
            if int(rank) != len(tokens) or not token:
                raise ValueError
        except (ValueError, binascii.Error):
            raise _damaged(path, number, f"expected a token in base64 and the rank {len(tokens)}") from None
        tokens.append(token)
    tokenizer = Tokenizer(tuple(tokens), header["pattern"], tuple(header["specials"]))
    if tokenizer.vocab_size != header["vocab_size"]:
        expected = header["vocab_size"] - len(tokenizer.specials)
        raise _damaged(path, len(lines) + 1, f"ends after {len(tokens)} of {expected} tokens")
    if tokenizer.fingerprint != header["fingerprint"]:
        raise _damaged(path, 1, "the tokens do not match the header's fingerprint")
    try:
        tokenizer.encoding.encode_ordinary("")
    except Exception as error:  # tiktoken reports a bad pattern or token table as a bare ValueError or AssertionError
        raise _damaged(path, 1, f"tiktoken refuses it ({str(error).splitlines()[0]})") from None
    return tokenizer


def load_token_bytes(folder: Path | str) -> np.ndarray:
    """Read the lengths that `save` wrote: int64 (vocab_size,), bytes per token, 0 for specials.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = Path(folder) / BYTES_FILE
    lines = _read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not (line.isascii() and line.isdigit()):
            raise _damaged(path, number, "expected a number of bytes")
    return np.array([int(line) for line in lines], dtype=np.int64)


def _header(path: Path, line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    kinds = {"format": str, "vocab_size": int, "pattern": str, "specials": list, "fingerprint": str}
    if not isinstance(header, dict) or any(not isinstance(header.get(key), kind) for key, kind in kinds.items()):
        raise _damaged(path, 1, f"expected a JSON header with {', '.join(kinds)}")
    if header["format"] != FORMAT:
        raise UserError(f"{path}: written as {header['format']!r}, this program reads {FORMAT!r}")
    return header


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train a tokenizer with `{TRAIN_COMMAND}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); train again with `{TRAIN_COMMAND}`") from None
    if not text.endswith("\n"):
        raise _damaged(path, text.count("\n") + 1, "the file is cut off")
    return text.split("\n")[:-1]


def _damaged(path: Path, line: int, what: str) -> UserError:
    return UserError(f"{path} line {line}: {what}; the file is damaged, train again with `{TRAIN_COMMAND}`")
