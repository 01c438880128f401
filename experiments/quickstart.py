"""Train a small chat model on a laptop in minutes: tokenizer, pretraining, fine-tuning, evaluation, RL, report.

    torchrun launch.py --experiment=quickstart
    torchrun launch.py --experiment=quickstart --resume          # after an interruption: finished stages are skipped

Needs no network and no GPU: the corpus is the text of the Python installation (docstrings, comments, help pages). The
model learns to add with the calculator, to spell, and who it is. Takes 13 minutes on two CPU cores (AMD Zen 4):
pretraining 7 (to about 1.94 bits per byte), fine-tuning 4, RL 1. The final model solves nearly all held-out sums of two
numbers and spells seven of ten words. Writes runs/quickstart, quickstart_sft and quickstart_rl to the base folder.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from experiments import eval_chat, pretrain, report, rl, sft
from nanochat import distributed
from nanochat.checkpoint import CheckpointConfig
from nanochat.config import NonNegativeInt, base_dir
from nanochat.data import DataConfig, sources, tokenizer
from nanochat.optim import OptimConfig
from nanochat.text import format_duration
from nanochat.train import EvalConfig, RolloutConfig

VOCAB_SIZE = 4096
PROMPTS = ("Return the", "This module provides", "If the file does not exist,", "The list of", "A string that")
QUESTIONS = ("What is 12*3?", "What is 548-79?", "Spell the word: tiger", "Who are you?", "How much is 25 plus 17?")
SFT_TASKS = ("arithmetic:size=8000", "simplespelling:size=15000", "8*identity")
SHARED = ("seed", "device", "dtype", "compile", "resume", "overwrite", "sharding", "checkpoint")
EVAL_TASKS, EVAL_PROBLEMS = ("arithmetic", "simplespelling"), 128


@dataclasses.dataclass(frozen=True)
class Config(pretrain.Config):
    """Pretraining settings of a small model, and the length of the later stages.

    Attributes:
        sft_steps: fine-tuning steps; 0 skips fine-tuning and RL. rl_steps: RL steps; 0 skips RL.
    """

    sft_steps: NonNegativeInt = 220
    rl_steps: NonNegativeInt = 24


def config() -> Config:
    return Config(
        name="quickstart",
        depth=4,
        overwrite=True,
        compile=False,  # needs a C++ compiler and takes a minute, more than it saves here
        tokenizer=str(base_dir() / "quickstart_tokenizer"),
        device_batch_size=16,
        total_batch_size=16 * 256,
        num_iterations=340,
        model=pretrain.ShapeConfig(sequence_len=256, aspect_ratio=48, head_dim=64, window_pattern="SL"),
        # The scaling rules are tuned for runs a hundred times as long; in so few steps the matrices need more.
        optim=OptimConfig(matrix_lr=0.15, weight_decay=0.1),
        data=DataConfig(source="embedded"),
        core=pretrain.CoreConfig(every_steps=None),
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


def run(config: Config, runtime: distributed.Runtime) -> None:
    """Run all stages, and print the next commands."""
    start, name = time.perf_counter(), str(config.name)
    here: dict[str, Any] = {"device": config.device, "dtype": config.dtype}

    def evaluate(run: str) -> None:
        eval_chat.run(
            eval_chat.Config(**here, run=run, tasks=EVAL_TASKS, max_problems=EVAL_PROBLEMS, max_tokens=64), runtime
        )

    if runtime.is_main:
        prepare_data(config)
    distributed.barrier()
    print(f"\n3. pretraining: {config.num_iterations} steps", flush=True)
    pretrain.run(config, runtime)
    if config.sft_steps:
        name = f"{config.name}_sft"
        print(f"\n4. fine-tuning: {config.sft_steps} steps on sums, spelling and identity", flush=True)
        sft.run(sft_config(config), runtime)
        print("\n5. evaluation on held-out problems", flush=True)
        evaluate(name)
    if config.sft_steps and config.rl_steps:
        name = f"{config.name}_rl"
        print(f"\n6. reinforcement learning: {config.rl_steps} steps on sums", flush=True)
        rl.run(rl_config(config), runtime)
        evaluate(name)
    print("\n7. report", flush=True)
    report.run(report.Config(**here, run=name, prompts=PROMPTS, questions=QUESTIONS, answer_tokens=64), runtime)
    print(f"quickstart took {format_duration(time.perf_counter() - start)}. Next:")
    for arguments, purpose in (
        (f"chat --set run={name}" + ("" if config.sft_steps else " --set complete=true"), "talk to the model"),
        (f"web --set run={name}", "the same in a browser"),
        ("quickstart --set name=larger --set depth=6 --set num_iterations=1000", "train a larger model"),
    ):
        print(f"  python launch.py --experiment={arguments:<36}  {purpose}")


def prepare_data(config: Config) -> None:
    """Make the corpus and the tokenizer, unless they exist."""
    print("1. corpus: text of this Python installation", flush=True)
    shards = sources.shards_of(config.data, "train")
    print(f"   {len(shards)} training shards and one for validation in {shards[0].path.parent}")
    print(f"2. tokenizer: {VOCAB_SIZE} tokens", flush=True)
    folder = pretrain.tokenizer_folder(config)
    if (folder / tokenizer.TOKENS_FILE).exists():
        print(f"   already in {folder}")
    else:
        tokenizer.save(tokenizer.train(sources.texts(config.data, "train"), VOCAB_SIZE), folder)
        print(f"   trained, saved in {folder}")


def shared(config: Config, *names: str) -> dict[str, Any]:
    """Return the settings that a later stage shares with pretraining."""
    return {name: getattr(config, name) for name in (*SHARED, *names)}


def sft_config(config: Config) -> sft.Config:
    return sft.Config(
        **shared(config, "train", "metrics"),
        run=config.name,
        name=f"{config.name}_sft",
        tasks=SFT_TASKS,
        val_tasks=("arithmetic:test", "simplespelling:test"),
        num_iterations=config.sft_steps,
        eval=EvalConfig(every_steps=50, tokens=2**13, sample_every_steps=None, sample_tokens=48, prompts=QUESTIONS[:4]),
        chat=sft.ChatConfig(tasks=()),
    )


def rl_config(config: Config) -> rl.Config:
    return rl.Config(
        **shared(config),
        run=f"{config.name}_sft",
        name=f"{config.name}_rl",
        task="arithmetic",
        num_iterations=config.rl_steps,
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=8, max_tokens=64),
        # So few answers are too noisy for the embeddings and matrices; they suffice for the unembedding.
        optim=dataclasses.replace(
            rl.OPTIM,
            embedding_lr=0.0,
            unembedding_lr=0.01,
            matrix_lr=0.0,
            scalar_lr=0.0,
            lr_fraction=0.3,
            moments=True,
        ),
        device_batch_size=16,
        eval=rl.PassAtKConfig(every_steps=None, problems=64, sample_every_steps=None),
        metrics=dataclasses.replace(config.metrics, every_steps=1, noise_scale_every=0),
    )
