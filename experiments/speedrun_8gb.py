"""Train a chat model on one 8 GB GPU in an evening: depth 10; stages and output are those of --experiment=speedrun.

Pretraining: 195,952,986 parameters, 560,988,160 tokens (8 per scaling parameter), by the planner 3h48m on an RTX 3070
at 50% MFU; the other stages come on top. Expected bits per byte: no estimate, since the scaling rules give no loss.
The run prints this for the GPU that it finds.
"""

import dataclasses
import functools

from experiments import speedrun

base = speedrun.Config().pretrain
pretrain = dataclasses.replace(base, depth=10, fit="8gb", device_batch_size="auto")
config = functools.partial(speedrun.Config, name="speedrun_8gb", pretrain=pretrain)
run = speedrun.run
