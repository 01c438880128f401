"""Convert a checkpoint of karpathy/nanochat, or what --experiment=export wrote, to a run.

    torchrun launch.py --experiment=convert --set model=.../model_021400.pt --set meta=.../meta_021400.json \
        --set ranks=ranks.tiktoken --set name=d20_reference
    torchrun launch.py --experiment=convert --set model=<folder of --experiment=export> --set name=d20_back

A folder is of format hf (also after training in transformers and `save_pretrained`), safetensors or reference; its
parameters come back bit for bit. Pickled code is never run. The reference's tokenizer is a pickle: write its ranks as
text, once, in the reference's own environment, with

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
from nanochat.config import Settings, UserError, base_dir
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
        model: the reference's model_*.pt, or a folder; a relative path is also looked up under the base folder.
        meta: its meta_*.json, of which `model_config` is read; default: the one beside it.
        ranks: text file with lines `base64 rank` of the reference's tokenizer; default: ranks.tiktoken beside it, or
            convert without tokenizer.
        name: of the run to write.
        stage: last training stage of the model; chats warn about base models. Default: as the folder says, else base.
    """

    model: str = ""
    meta: str = ""
    ranks: str | None = None
    name: stage.RunName = "reference"
    stage: Literal["base", "mid", "sft", "dpo", "rl"] | None = None


class Weights(NamedTuple):
    """A training state with parameters only."""

    step: Tensor
    params: TensorDict


config = Config


class Source(NamedTuple):
    """What a file or folder holds."""

    params: TensorDict
    tok: data.Tokenizer | None
    step: object
    stage: object


def run(config: Config, runtime: Runtime) -> None:
    distributed.require_single(runtime, "convert")
    if not config.model:
        raise UserError("nothing to convert: --set model=model_….pt, or the folder of an export")
    path = Path(config.model).expanduser()
    if not path.exists() and (base_dir() / path).exists():
        path = base_dir() / path
    is_reference = not (path / "config.json").exists()
    if not is_reference and (config.meta or config.ranks):
        raise UserError(f"{path}: meta and ranks are for the reference's model_*.pt")
    source = read_reference(config, path) if is_reference else read_folder(path)
    if type(source.step) is not int or not 0 <= source.step < 2**63:
        raise UserError(f"{path}: has step {repr(source.step)[:100]}, expected a whole number from 0")
    shape = model.config_of(source.params)
    if source.tok and source.tok.vocab_size > shape.vocab_size:
        raise UserError(f"{path}: the tokenizer has {source.tok.vocab_size} tokens, the model {shape.vocab_size}")
    known = source.stage if source.stage in ("base", "mid", "sft", "dpo", "rl") else "base"
    saved = {"stage": config.stage or known, "converted_from": str(config.model)}
    folder = write_run(config.name, source.step, source.params, shape, source.tok, saved)
    print(f"{model.count(shape)['total']:,} parameters of step {source.step} written to {folder}")
    print(f"next: python launch.py --experiment=chat --set run={config.name}")


def read_folder(folder: Path) -> Source:
    """Read an export in format hf or safetensors."""
    from nanochat.checkpoint import huggingface, tensor_files

    own = tensor_files.json_object(folder / "config.json").get("format") == tensor_files.FORMAT
    params, tok, settings = (tensor_files if own else huggingface).load(folder)
    return Source(params, tok, settings.get("step", 0), settings.get("stage"))


def read_reference(config: Config, path: Path) -> Source:
    if path.is_dir():
        if not (files := sorted(path.glob("model_*.pt"))):
            raise UserError(f"{path}: holds neither config.json nor a model_*.pt")
        path = files[-1]
    meta_path = Path(config.meta) if config.meta else path.with_name(f"meta_{path.stem.removeprefix('model_')}.json")
    try:
        meta = json.loads(jsonl.read_text(meta_path))
        shape = checkpoint.convert.config_from_reference(dict(meta["model_config"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{meta_path}: has no model_config; use the meta_*.json next to the model") from None
    params = checkpoint.convert.load_reference(path, shape)
    beside = path.with_name("ranks.tiktoken")
    ranks = Path(config.ranks) if config.ranks else beside if beside.exists() else None
    tok = read_ranks(ranks) if ranks else None
    if tok and tok.vocab_size != shape.vocab_size:
        raise UserError(f"{ranks}: {tok.vocab_size} tokens with special tokens, the model has {shape.vocab_size}")
    return Source(params, tok, meta.get("step", 0), meta.get("stage"))


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
