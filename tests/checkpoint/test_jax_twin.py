"""A checkpoint read by plain JAX gives the same logits: state is data."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import jax_twin
import pytest
import tiny_run
import torch
from small_model import WINDOWED, random_batch

from nanochat import checkpoint, model


@pytest.mark.parametrize("pattern", ["SSSL", "L"])
def test_logits(base: Path, pattern: str) -> None:
    config = dataclasses.replace(WINDOWED, window_pattern=pattern)
    folder = tiny_run.save_run(base, config=config, tok=None) / "checkpoints"
    params, *_ = checkpoint.load_params(folder)
    tokens = random_batch(config, n_time=300)["inputs"]  # longer than both windows
    read, fields = jax_twin.load(folder / "1")
    theirs = torch.from_numpy(jax_twin.apply(read, fields, jnp.asarray(tokens.numpy())).__array__().copy())
    assert (theirs - model.apply(params, tokens)).abs().max() < 1e-5
