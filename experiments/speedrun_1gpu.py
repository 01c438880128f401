"""Train a chat model on one 24 GB GPU in an evening: depth 12; stages and output are those of --experiment=speedrun.

Pretraining: 286,261,730 parameters, 880,803,840 tokens (8 per scaling parameter), by the planner 2h15m on an RTX 4090
and 5h14m on an RTX 3090, at 50% MFU; the other stages come on top. Expected bits per byte: no estimate, since the
scaling rules give no loss. The run prints this for the GPU that it finds.
"""

import dataclasses
import functools

from experiments import speedrun

base = speedrun.Config().pretrain
pretrain = dataclasses.replace(base, depth=12, fit="24gb", device_batch_size="auto")
config = functools.partial(speedrun.Config, name="speedrun_1gpu", pretrain=pretrain)
run = speedrun.run
