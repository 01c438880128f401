"""Pretrain at depth 24: the reference's run, all else by the scaling rules.

    torchrun launch.py --experiment=pretrain_d24

Settings and output are those of --experiment=pretrain.
"""

import functools

from experiments import pretrain

config = functools.partial(pretrain.Config, depth=24)
run = pretrain.run
