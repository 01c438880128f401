"""Train the tokenizer: byte-level BPE on the training split.

    torchrun launch.py --experiment=tokenizer
    torchrun launch.py --experiment=tokenizer --set data.source=embedded --set vocab_size=4096

Reads up to two billion characters, at most ten thousand of one document. A core reads about four million a second, so
that takes some minutes; the embedded corpus takes seconds. Prints how long it took, how fast it encodes and how well it
compresses the validation split, and where it was saved.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nanochat.data import DataConfig, sources, tokenizer

if TYPE_CHECKING:
    from nanochat.data import Tokenizer
    from nanochat.distributed import Runtime

CHECK_CHARS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, and on what.

    Attributes:
        vocab_size: number of token ids, the nine special tokens included.
        max_chars: characters to read in all.
        max_chars_per_doc: characters to read of one document.
        out: folder to save in; none: where the other experiments look for it.
    """

    data: DataConfig = DataConfig()
    vocab_size: int = 32768
    max_chars: int = 2_000_000_000
    max_chars_per_doc: int = 10_000
    out: str | None = None


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Train, save and measure."""
    if not runtime.is_main:
        return
    folder = Path(config.out) if config.out else tokenizer.default_dir()
    print(f"training {config.vocab_size:,} tokens on data.source={config.data.source}", flush=True)
    sources.shards_of(config.data, "train")  # a missing source is reported before the progress bar
    start = time.perf_counter()
    with tqdm(unit=" characters", unit_scale=True) as bar:
        texts = counted(sources.texts(config.data, "train"), bar, config.max_chars_per_doc)
        tok = tokenizer.train(
            texts, config.vocab_size, max_chars=config.max_chars, max_chars_per_doc=config.max_chars_per_doc
        )
    seconds = time.perf_counter() - start
    print(f"trained on {bar.n:,} characters in {seconds:.1f} s, {bar.n / seconds / 1e6:.1f} million a second")
    tokenizer.save(tok, folder)
    print(f"saved in {folder}, fingerprint {tok.fingerprint[:12]}")
    measure(tok, config.data)
    settings = "" if config.data.source == DataConfig().source else f" --set data.source={config.data.source}"
    settings += f" --set tokenizer={folder}" if config.out else ""
    print(f"next: torchrun launch.py --experiment=pretrain_d20{settings}")
    print(f"  or: torchrun launch.py --experiment=tokenizer_eval{settings}")


def counted(texts: Iterable[str], bar: tqdm, max_chars_per_doc: int) -> Iterator[str]:
    """Yield the documents, moving the progress bar by the characters that are read of them."""
    for text in texts:
        yield text
        bar.update(min(len(text), max_chars_per_doc))
    bar.set_description("merging")


def measure(tok: Tokenizer, data: DataConfig) -> None:
    """Print compression and speed on the validation split."""
    texts, chars = [], 0
    for text in sources.texts(data, "val"):
        texts.append(text)
        chars += len(text)
        if chars >= CHECK_CHARS:
            break
    size = sum(len(text.encode()) for text in texts)
    start = time.perf_counter()
    tokens = sum(map(len, tok.encode_batch(texts)))
    seconds = time.perf_counter() - start
    print(
        f"validation text: {size:,} bytes in {tokens:,} tokens, {size / tokens:.3f} bytes per token; encoded at "
        f"{size / seconds / 1e6:.1f} MB/s, {tokens / seconds:,.0f} tokens/s on {os.cpu_count()} cores"
    )
