"""Mid-train a base model: conversations and tasks as plain text, before fine-tuning.

    torchrun --nproc_per_node=8 launch.py --experiment=midtrain --set run=d20
    torchrun --nproc_per_node=8 launch.py --experiment=sft --set run=d20_mid             # afterwards

An optional stage that teaches the format of conversations, multiple choice, tool calls and spelling. The loss is on all
tokens, the user's too. The learning rate is constant for four fifths of the run, then falls to 0. Settings are those of
--experiment=sft; writes runs/<base run>_mid.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments import sft

if TYPE_CHECKING:
    from nanochat.distributed import Runtime


def config() -> sft.Config:
    """Return the reference's settings."""
    base = sft.config()
    return dataclasses.replace(
        base,
        tasks=(
            "smoltalk", "mmlu:auxiliary_train", "gsm8k", "2*identity", "simplespelling:size=200000",
            "spellingbee:size=80000",
        ),
        assistant_only=False,
        optim=dataclasses.replace(base.optim, lr_fraction=1.0, warmdown_ratio=0.2),
        chat=dataclasses.replace(base.chat, tasks=()),
    )  # fmt: skip


def run(config: sft.Config, runtime: Runtime) -> None:
    """Mid-train a base run."""
    sft.train_stage(config, runtime, "mid", ("base",))
