"""Convert a checkpoint of the reference (karpathy/nanochat) to a run.

    torchrun launch.py --experiment=convert --set model=.../model_021400.pt --set meta=.../meta_021400.json \
        --set ranks=ranks.tiktoken --set name=d20_reference

Pickled code is never run. The reference's tokenizer is a pickle: write its ranks as text, once, in the reference's own
environment, with

    python -c "import base64; from nanochat.tokenizer import get_tokenizer; \
        [print(base64.b64encode(t).decode(), r) for t, r in get_tokenizer().enc._mergeable_ranks.items()]" \
        > ranks.tiktoken

Writes runs/<name> under the base folder. Takes seconds to a minute.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nanochat import checkpoint, data, distributed, jsonl, metrics, model
from nanochat.config import Settings, UserError
from nanochat.data import tokenizer
from nanochat.train import config as stage

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

    from nanochat.distributed import Runtime


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What to convert.

    Attributes:
        model: the reference's model_*.pt.
        meta: its meta_*.json, of which `model_config` is read.
        ranks: text file with lines `base64 rank` of its tokenizer; default: convert without tokenizer.
        name: of the run to write.
        stage: last training stage of the model; chats warn about base models.
    """

    model: str = ""
    meta: str = ""
    ranks: str | None = None
    name: stage.RunName = "reference"
    stage: Literal["base", "mid", "sft", "rl"] = "base"


class Weights(NamedTuple):
    """A training state with parameters only."""

    step: Tensor
    params: TensorDict


config = Config


def run(config: Config, runtime: Runtime) -> None:
    distributed.require_single(runtime, "convert")
    if not config.model or not config.meta:
        raise UserError("set the two files of the reference: --set model=model_….pt --set meta=meta_….json")
    try:
        meta = json.loads(jsonl.read_text(Path(config.meta)))
        shape = checkpoint.convert.config_from_reference(dict(meta["model_config"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{config.meta}: has no model_config; use the meta_*.json next to the model") from None
    step = meta.get("step", 0)
    if type(step) is not int or not 0 <= step < 2**63:
        raise UserError(f"{config.meta}: has step {repr(step)[:100]}, expected a whole number from 0")
    params = checkpoint.convert.load_reference(Path(config.model), shape)
    tok = read_ranks(Path(config.ranks)) if config.ranks else None
    if tok and tok.vocab_size != shape.vocab_size:
        raise UserError(
            f"{config.ranks}: {tok.vocab_size} tokens with special tokens, the model has {shape.vocab_size}"
        )
    saved = {"stage": config.stage, "converted_from": str(config.model)}
    folder = write_run(config.name, step, params, shape, tok, saved)
    print(f"{model.count(shape)['total']:,} parameters of step {step} written to {folder}")
    print(f"next: python launch.py --experiment=chat --set run={config.name}")


def write_run(
    name: str, step: int, params: TensorDict, shape: model.ModelConfig, tok: data.Tokenizer | None, meta: dict[str, Any]
) -> Path:
    """Save parameters as the only checkpoint of a new run; return its folder."""
    import torch

    folder = stage.run_folder(name)
    with contextlib.ExitStack() as exits:
        exits.enter_context(metrics.run_lock.held(folder))
        if checkpoint.steps(folder / "checkpoints"):
            raise UserError(f"run {folder} already has checkpoints: --set name=<other>")
        files = {}
        if tok:
            tokenizer.save(tok, folder / "tokenizer")
            files = {name: folder / "tokenizer" / name for name in tokenizer.FILES}
        manager = checkpoint.open_manager(folder / "checkpoints")
        exits.callback(checkpoint.close, manager)
        saved = meta | {"model": dataclasses.asdict(shape)}
        checkpoint.save(manager, Weights(torch.tensor(step), params), saved, files=files)
    return folder


def read_ranks(path: Path) -> data.Tokenizer:
    """Return the tokenizer whose tokens are the `base64 rank` lines of a file."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(jsonl.read_text(path).splitlines(), 1):
        try:
            token, rank = line.split()
            value = base64.b64decode(token, validate=True)
            is_first = ranks.setdefault(int(rank), value) is value
        except ValueError:  # binascii.Error is one
            raise UserError(f"{path}, line {number}: expected a token in base64 and its rank") from None
        if not is_first:
            raise UserError(f"{path}, line {number}: the rank {rank} is there twice")
    if sorted(ranks) != list(range(len(ranks))):
        raise UserError(f"{path}: the ranks are not 0 … {len(ranks) - 1}")
    tok = data.Tokenizer(tuple(ranks[i] for i in range(len(ranks))))
    try:
        tokenizer.check(tok)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return tok
