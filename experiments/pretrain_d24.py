"""Pretrain at depth 24: the reference's run, all else by the scaling rules.

    torchrun launch.py --experiment=pretrain_d24

Settings and output are those of --experiment=pretrain.
"""

import dataclasses

from experiments import pretrain
from experiments.pretrain import Config

run = pretrain.run


def config() -> Config:
    """Return the reference's settings at depth 24."""
    return dataclasses.replace(pretrain.config(), depth=24)
