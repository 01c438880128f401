"""Pretrain at depth 12: the reference's run, all else by the scaling rules.

    torchrun launch.py --experiment=pretrain_d12

Settings and output are those of --experiment=pretrain.
"""

import functools

from experiments import pretrain

config = functools.partial(pretrain.Config, depth=12)
run = pretrain.run
