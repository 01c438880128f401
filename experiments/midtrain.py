"""Mid-train a base model: conversations and tasks as plain text, before fine-tuning.

    torchrun --nproc_per_node=8 launch.py --experiment=midtrain --set run=d20
    torchrun --nproc_per_node=8 launch.py --experiment=sft --set run=d20_mid             # afterwards

An optional stage that teaches the format of conversations, multiple choice, tool calls and spelling. The loss is on all
tokens, the user's too. The learning rate is constant for four fifths of the run, then falls to 0. Settings are those of
--experiment=sft; writes runs/<base run>_mid.
"""

from __future__ import annotations

import dataclasses

from experiments import sft
from nanochat import distributed

TASKS = ("smoltalk", "mmlu:auxiliary_train", "gsm8k", "2*identity", "simplespelling:size=200000")


def config() -> sft.Config:
    return sft.Config(
        tasks=(*TASKS, "spellingbee:size=80000"),
        assistant_only=False,
        optim=dataclasses.replace(sft.OPTIM, lr_fraction=1.0, warmdown_ratio=0.2),
        chat=sft.ChatConfig(tasks=()),
    )


def run(config: sft.Config, runtime: distributed.Runtime) -> None:
    sft.train_stage(config, runtime, "mid", ("base",))
