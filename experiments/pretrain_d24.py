"""Pretrain at depth 24, a run of the reference; settings and output are those of --experiment=pretrain."""

import functools

from experiments import pretrain

config = functools.partial(pretrain.Config, depth=24)
run = pretrain.run
