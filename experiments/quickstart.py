"""Everything on a bare machine in minutes: corpus, tokenizer, pretraining, evaluation, samples.

    torchrun launch.py --experiment=quickstart

No network, no GPU: the text is that of the Python installation itself (docstrings, comments, help pages). Trains a
tokenizer of 4096 tokens and a small model, prints validation bits per byte and samples, and leaves a checkpoint and
curves in runs/quickstart under the base folder. Five to six minutes on two CPU cores; ends near 1.9 bits per byte.
"""

import dataclasses
import time

from experiments import pretrain
from nanochat import dataset, tokenizer
from nanochat.checkpoint import CheckpointConfig
from nanochat.dataset import DataConfig
from nanochat.optim import OptimConfig
from nanochat.runtime import Runtime, base_dir, wait_for_all
from nanochat.stage import EvalConfig
from nanochat.units import duration

VOCAB_SIZE = 4096
PROMPTS = ("Return the", "This module provides", "If the file does not exist,", "The list of", "A string that")


@dataclasses.dataclass(frozen=True)
class Config(pretrain.Config):
    """Pretraining settings, small enough for a laptop."""


def config() -> Config:
    """Return the settings of the quickstart."""
    return Config(
        name="quickstart",
        depth=4,
        overwrite=True,
        compile=False,  # compiling takes a C++ compiler and a minute, and would save less than that here
        tokenizer=str(base_dir() / "quickstart_tokenizer"),
        device_batch_size=16,
        total_batch_size=16 * 256,
        num_iterations=400,
        model=pretrain.ShapeConfig(sequence_len=256, aspect_ratio=48, head_dim=64, window_pattern="SL"),
        # The rules scale rates and decay for runs a hundred times as long; in so few steps the matrices need more.
        optim=OptimConfig(matrix_lr=0.15, weight_decay=0.1),
        data=DataConfig(source="embedded"),
        eval=EvalConfig(
            every_steps=50,
            tokens=2**15,
            sample_every_steps=None,
            sample_tokens=40,
            prompts=PROMPTS,
            temperature=0.8,
            top_k=50,
        ),
        checkpoint=CheckpointConfig(every_steps=100),
    )


def run(config: Config, runtime: Runtime) -> None:
    """Build what is missing, pretrain, and say what to do next."""
    start = time.perf_counter()
    if runtime.is_main:
        build(config)
    wait_for_all()
    print("3. pretraining", flush=True)
    pretrain.run(config, runtime)
    print(f"quickstart took {duration(time.perf_counter() - start)}. Next:")
    name = "" if config.name == "quickstart" else f" --set run={config.name}"
    print(f"  python launch.py --experiment=chat{name:<31}talk to it (a base model: it continues)")
    print(f"  python launch.py --experiment=web{name:<32}the same in a browser")
    print("  python launch.py --help                                         what else there is")
    print("  python launch.py --experiment=quickstart --set name=larger --set depth=6 --set num_iterations=1000")


def build(config: Config) -> None:
    """Make the corpus and the tokenizer, unless they are there."""
    folder = pretrain.tokenizer_folder(config)
    print("1. corpus: text of this Python installation", flush=True)
    shards = dataset.resolve(config.data, "train")
    print(f"   {len(shards)} training shards and one for validation in {shards[0].path.parent}")
    print(f"2. tokenizer: {VOCAB_SIZE} tokens", flush=True)
    if (folder / tokenizer.TOKENS_FILE).exists():
        print(f"   already in {folder}")
    else:
        tok = tokenizer.train(dataset.texts(config.data, "train"), VOCAB_SIZE)
        tokenizer.save(tok, folder)
        print(f"   trained, saved in {folder}")
