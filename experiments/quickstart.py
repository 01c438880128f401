"""Everything on a bare machine in minutes: corpus, tokenizer, pretraining, chat with tools, evaluation, RL, a report.

    torchrun launch.py --experiment=quickstart
    torchrun launch.py --experiment=quickstart --resume          # after a stop: what is finished is not done again

No network, no GPU: the text is that of the Python installation itself (docstrings, comments, help pages). Trains a
tokenizer of 4096 tokens and a small model, teaches it to answer sums through the calculator, to spell and who it is,
lets it practise, and writes a report card. 13 minutes on two CPU cores (AMD Zen 4): pretraining takes 7 of them and
ends near 1.94 bits per byte, fine-tuning 4, practising 1. In the end nearly all sums of two numbers that it has not
seen are right, and seven of ten words are spelled. Leaves runs/quickstart, quickstart_sft and quickstart_rl under the
base folder, and says how to talk to the last.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from experiments import eval_chat, pretrain, report, rl, sft
from nanochat import distributed
from nanochat.checkpoint import CheckpointConfig
from nanochat.config import UserError, base_dir
from nanochat.data import DataConfig, sources, tokenizer
from nanochat.optim import OptimConfig
from nanochat.text import format_duration
from nanochat.train import EvalConfig, RolloutConfig

if TYPE_CHECKING:
    from nanochat.distributed import Runtime

VOCAB_SIZE = 4096
PROMPTS = ("Return the", "This module provides", "If the file does not exist,", "The list of", "A string that")
QUESTIONS = ("What is 12*3?", "What is 548-79?", "Spell the word: tiger", "Who are you?", "How much is 25 plus 17?")
LESSONS = ("arithmetic:size=8000", "simplespelling:size=15000", "8*identity")
PRACTICE = "arithmetic"
EXAMS, PROBLEMS = ("arithmetic", "simplespelling"), 128


@dataclasses.dataclass(frozen=True)
class Config(pretrain.Config):
    """Pretraining settings, small enough for a laptop, and what follows it.

    Attributes:
        sft_steps: of fine-tuning; 0: the base model is all. rl_steps: of practising; 0: none.
    """

    sft_steps: int = 220
    rl_steps: int = 24

    def __post_init__(self) -> None:
        if min(self.sft_steps, self.rl_steps) < 0:
            raise UserError(f"sft_steps={self.sft_steps}, rl_steps={self.rl_steps}: must be 0 or more")


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
        num_iterations=340,
        model=pretrain.ShapeConfig(sequence_len=256, aspect_ratio=48, head_dim=64, window_pattern="SL"),
        # The rules scale rates and decay for runs a hundred times as long; in so few steps the matrices need more.
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


def run(config: Config, runtime: Runtime) -> None:
    """Go through all stages, and say what to do next."""
    start = time.perf_counter()
    if runtime.is_main:
        build(config)
    distributed.barrier()
    heading(3, f"pretraining: {config.num_iterations} steps")
    pretrain.run(config, runtime)
    runs = [str(config.name)]
    if config.sft_steps:
        runs.append(f"{config.name}_sft")
        heading(4, f"fine-tuning: {config.sft_steps} steps on sums, spelling and who it is")
        sft.run(tuning(config, *runs[-2:]), runtime)
        heading(5, "evaluation on problems it has not seen")
        examine(config, runs[-1], runtime)
    if config.sft_steps and config.rl_steps:
        runs.append(f"{config.name}_rl")
        heading(6, f"reinforcement learning: {config.rl_steps} steps of sums")
        rl.run(practising(config, *runs[-2:]), runtime)
        examine(config, runs[-1], runtime)
    heading(7, "report card")
    card = dataclasses.replace(report.config(), run=runs[-1], prompts=PROMPTS, questions=QUESTIONS, answer_tokens=64)
    report.run(dataclasses.replace(card, device=config.device, dtype=config.dtype), runtime)
    print(f"quickstart took {format_duration(time.perf_counter() - start)}. Next:")
    name = f" --set run={runs[-1]}"
    words = "" if config.sft_steps else " (a base model: it continues)"
    print(f"  python launch.py --experiment=chat{name:<31}talk to it{words}: What is 37+85?")
    print(f"  python launch.py --experiment=web{name:<32}the same in a browser")
    print("  python launch.py --help                                         what else there is")
    print("  python launch.py --experiment=quickstart --set name=larger --set depth=6 --set num_iterations=1000")


def heading(number: int, text: str) -> None:
    """Print what comes now."""
    print(f"\n{number}. {text}", flush=True)


def build(config: Config) -> None:
    """Make the corpus and the tokenizer, unless they are there."""
    folder = pretrain.tokenizer_folder(config)
    print("1. corpus: text of this Python installation", flush=True)
    shards = sources.shards_of(config.data, "train")
    print(f"   {len(shards)} training shards and one for validation in {shards[0].path.parent}")
    print(f"2. tokenizer: {VOCAB_SIZE} tokens", flush=True)
    if (folder / tokenizer.TOKENS_FILE).exists():
        print(f"   already in {folder}")
    else:
        tok = tokenizer.train(sources.texts(config.data, "train"), VOCAB_SIZE)
        tokenizer.save(tok, folder)
        print(f"   trained, saved in {folder}")


def shared(config: Config) -> dict[str, object]:
    """Return the settings that all stages take over."""
    names = ("seed", "device", "dtype", "compile", "resume", "overwrite", "train", "sharding", "metrics")
    return {name: getattr(config, name) for name in names}


def tuning(config: Config, base: str, name: str) -> sft.Config:
    """Return the settings of fine-tuning."""
    start = sft.config()
    return dataclasses.replace(
        start,
        **shared(config),  # pyright: ignore[reportArgumentType]
        run=base,
        name=name,
        tasks=LESSONS,
        val_tasks=("arithmetic:test", "simplespelling:test"),
        num_iterations=config.sft_steps,
        eval=dataclasses.replace(
            start.eval, every_steps=50, tokens=2**13, prompts=QUESTIONS[:4], sample_tokens=48, temperature=0.0
        ),
        chat=dataclasses.replace(start.chat, tasks=()),
        checkpoint=config.checkpoint,
    )


def examine(config: Config, name: str, runtime: Runtime) -> None:
    """Evaluate a run on problems that are in no training split."""
    how = dataclasses.replace(eval_chat.config(), run=name, tasks=EXAMS, max_problems=PROBLEMS, max_tokens=64)
    eval_chat.run(dataclasses.replace(how, device=config.device, dtype=config.dtype), runtime)


def practising(config: Config, tuned: str, name: str) -> rl.Config:
    """Return the settings of reinforcement learning."""
    start = rl.config()
    return dataclasses.replace(
        start,
        **{n: x for n, x in shared(config).items() if n not in ("train", "metrics")},  # pyright: ignore[reportArgumentType]
        run=tuned,
        name=name,
        task=PRACTICE,
        num_iterations=config.rl_steps,
        rollout=RolloutConfig(prompts_per_step=16, samples_per_prompt=8, max_tokens=64),
        # So few answers are noise for tables and matrices; the unembedding learns from them which tokens to trust.
        optim=dataclasses.replace(
            start.optim,
            embedding_lr=0.0,
            unembedding_lr=0.01,
            matrix_lr=0.0,
            scalar_lr=0.0,
            lr_fraction=0.3,
            moments=True,
        ),
        device_batch_size=16,
        eval=rl.PassAtKConfig(every_steps=None, problems=64, sample_every_steps=None),
        checkpoint=config.checkpoint,
        metrics=dataclasses.replace(config.metrics, every_steps=1),
    )
