"""Pretrain at depth 26, a run of the reference; settings and output are those of --experiment=pretrain."""

import functools

from experiments import pretrain

config = functools.partial(pretrain.Config, depth=26)
run = pretrain.run
