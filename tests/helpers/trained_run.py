"""A small run with random weights, saved as a training run saves it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from small_model import random_params
from tensordict import TensorDict

from experiments import convert
from nanochat import checkpoint
from nanochat.data import Tokenizer, tokenizer
from nanochat.model import ModelConfig

TOK = Tokenizer((*(bytes([i]) for i in range(256)), b" the", b" a"))  # no vocabulary is smaller but by these two
CONFIG = ModelConfig(sequence_len=64, vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
TEXT = torch.tensor([[TOK.bos, *TOK.encode("the text of a test")]])


def save_run(
    base: Path,
    name: str = "bot",
    *,
    steps: tuple[int, ...] = (1,),
    config: ModelConfig = CONFIG,
    params: TensorDict | None = None,
    tok: Tokenizer | None = TOK,
    **meta: Any,
) -> Path:
    """Write a run as training does, with random parameters (the step is their seed); return its folder."""
    folder = base / "runs" / name
    files = {}
    if tok is not None:
        tokenizer.save(tok, folder / "tokenizer")
        files = {file: folder / "tokenizer" / file for file in tokenizer.FILES}
    manager = checkpoint.open_manager(folder / "checkpoints", checkpoint.CheckpointConfig(asynchronous=False))
    for step in steps:
        state = convert.Weights(torch.tensor(step), random_params(config, step) if params is None else params)
        checkpoint.save(manager, state, {"model": dataclasses.asdict(config), **meta}, files=files)
    checkpoint.close(manager)
    return folder


def set_time(folder: Path, step: int, seconds: float) -> None:
    os.utime(folder / "checkpoints" / str(step) / "meta" / "metadata", (seconds, seconds))


# ---------------------------------------------------------------------------------------------------------------
# What is read
