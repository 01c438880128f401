"""Train the tokenizer, byte-level BPE on the training split, or compare it with GPT-2's and GPT-4's.

    torchrun launch.py --experiment=tokenizer
    torchrun launch.py --experiment=tokenizer --set data.source=embedded --set vocab_size=4096
    torchrun launch.py --experiment=tokenizer --set eval_only=true

Training reads up to two billion characters, at most ten thousand per document, at about four million a second per core:
minutes, or seconds for the embedded corpus. Prints the speed and the compression of the validation split.

eval_only takes seconds. It prints bytes per token (more is better) for sample texts written for this purpose and for
the beginning of the training and validation splits, and how many more tokens the others need (+) or save (-). tiktoken
downloads the other two vocabularies once; without a network they are skipped, with the reason.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tiktoken
from tqdm import tqdm

from nanochat.config import PositiveFloat, PositiveInt, Settings, UserError
from nanochat.data import DataConfig, sources, tokenizer
from nanochat.text import table

if TYPE_CHECKING:
    from nanochat.distributed import Runtime

SPEED_CHARS = 10_000_000
BASELINES = ("gpt2", "cl100k_base")
SAMPLES = ("news", "code", "maths", "science", "korean", "german", "chinese")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to train on, and what to measure.

    Attributes:
        vocab_size: number of token ids, the nine special tokens included.
        max_chars: characters to read in total.
        max_chars_per_doc: characters to read per document.
        out: folder of the tokenizer; default: where the other experiments look for it.
        eval_only: load the tokenizer from `out` and compare its compression instead of training it.
        eval_chars: characters of each split that eval_only encodes.
        download_seconds: time limit of tiktoken's downloads.
    """

    data: DataConfig = DataConfig()
    vocab_size: Annotated[int, "at least 265", lambda x: x >= 265] = 32768
    max_chars: PositiveInt = 2_000_000_000
    max_chars_per_doc: PositiveInt = 10_000
    out: str | None = None
    eval_only: bool = False
    eval_chars: PositiveInt = 2_000_000
    download_seconds: PositiveFloat = 60.0


config = Config


def run(config: Config, runtime: Runtime) -> None:
    if runtime.is_main:
        (evaluate if config.eval_only else train)(config, Path(config.out) if config.out else tokenizer.default_dir())


def train(config: Config, folder: Path) -> None:
    """Train and save a tokenizer; print its compression and encoding speed on the validation split."""
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
    docs = first_chars(sources.texts(config.data, "val"), SPEED_CHARS)
    size = sum(len(text.encode()) for text in docs)
    start = time.perf_counter()
    tokens = sum(map(len, tok.encode_batch(docs)))
    seconds = time.perf_counter() - start
    print(
        f"validation text: {size:,} bytes in {tokens:,} tokens, {size / tokens:.3f} bytes per token; encoded at "
        f"{size / seconds / 1e6:.1f} MB/s, {tokens / seconds:,.0f} tokens/s on {os.cpu_count()} cores"
    )
    source = "" if config.data.source == DataConfig().source else f" --set data.source={config.data.source}"
    out = [f" --set {name}={folder}" if config.out else "" for name in ("tokenizer", "out")]
    print(f"next: torchrun launch.py --experiment=pretrain_d20{source}{out[0]}")
    print(f"  or: torchrun launch.py --experiment=tokenizer --set eval_only=true{source}{out[1]}")


def counted(texts: Iterable[str], bar: tqdm, max_chars_per_doc: int) -> Iterator[str]:
    """Yield the documents, advancing the progress bar by the characters that are read of them."""
    for text in texts:
        yield text
        bar.update(min(len(text), max_chars_per_doc))
    bar.set_description("merging")


def first_chars(texts: Iterable[str], max_chars: int) -> list[str]:
    """Return the first documents, `max_chars` characters in total."""
    chosen, left = [], max_chars
    for text in texts:
        chosen.append(text[:left])
        left -= len(chosen[-1])
        if left <= 0:
            break
    return chosen


def evaluate(config: Config, folder: Path) -> None:
    """Print bytes per token of every text by every tokenizer, and the others' difference in tokens to ours."""
    ours = tokenizer.load(folder)
    encoders: dict[str, Callable[[str], list[int]]] = {"ours": ours.encode}
    print(f"ours         {ours.vocab_size:>8,} tokens, {folder}")
    for name, baseline in load_baselines(config.download_seconds).items():
        if isinstance(baseline, str):
            print(f"{name:<12} skipped: {baseline}")
        else:
            print(f"{name:<12} {baseline.n_vocab:>8,} tokens")
            encoders[name] = baseline.encode_ordinary
    samples = Path(__file__).with_name("tokenizer_samples")
    texts = {name: [(samples / f"{name}.txt").read_text("utf-8")] for name in SAMPLES}
    for split in sources.SPLITS:
        try:
            texts[split] = first_chars(sources.texts(config.data, split), config.eval_chars)
        except UserError as error:
            print(f"{split:<12} skipped: {error}")
    rows = [["text", "bytes", *encoders]]
    for name, docs in texts.items():
        size = sum(len(doc.encode()) for doc in docs)
        own, *others = (sum(map(len, map(encode, docs))) for encode in encoders.values())
        differences = [f"{size / count:.3f} ({count / own - 1:+.1%})" for count in others]
        rows.append([name, f"{size:,}", f"{size / own:.3f}", *differences])
    print("\nbytes per token (difference in tokens)\n" + table(rows))


def load_baselines(seconds: float) -> dict[str, tiktoken.Encoding | str]:
    """Return tiktoken's encodings, or the reason why one could not be loaded."""
    unfinished = f"tiktoken's download did not finish in {seconds:g} s"
    loaded: dict[str, tiktoken.Encoding | str] = dict.fromkeys(BASELINES, unfinished)

    def load(name: str) -> None:
        try:
            loaded[name] = tiktoken.get_encoding(name)
        except Exception as error:  # any network error
            loaded[name] = f"tiktoken could not download it ({type(error).__name__})"

    for name in BASELINES:
        thread = threading.Thread(target=load, args=(name,), daemon=True)  # tiktoken has no time limit of its own
        thread.start()
        thread.join(seconds)
    return dict(loaded)
