"""Pretrain at depth 26: the reference's run, all else by the scaling rules.

    torchrun launch.py --experiment=pretrain_d26

Settings and output are those of --experiment=pretrain.
"""

import dataclasses

from experiments import pretrain
from experiments.pretrain import Config

run = pretrain.run


def config() -> Config:
    """Return the reference's settings at depth 26."""
    return dataclasses.replace(pretrain.config(), depth=26)
