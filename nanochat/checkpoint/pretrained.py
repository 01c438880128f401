"""Load a trained model from a run: `checkpoint.load("quickstart")`, a path, or nothing for the run saved last.

Everything is read from the checkpoint, the tokenizer included, so later changes of settings or of the tokenizer do not
affect a model.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import distributed, model, tree
from nanochat.checkpoint import integrity, manager
from nanochat.config import UserError, base_dir, nearest
from nanochat.data import SPECIALS, Tokenizer, tokenizer
from nanochat.model import ModelConfig, Params
from nanochat.text import format_count

TRAIN_COMMAND = "python launch.py --experiment=quickstart"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model.

    Attributes:
        params: with `config` attached, in the dtype to compute in.
        tokenizer: the one that the model was trained with.
        name, step, stage, folder: of the run; the stage is base, mid, sft or rl.
    """

    params: Params = dataclasses.field(repr=False)
    config: ModelConfig
    tokenizer: Tokenizer
    name: str
    step: int
    stage: str
    folder: Path


def load(
    run: str | Path | None = None,
    *,
    step: int | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
) -> Pretrained:
    """Read a checkpoint, and check that parameters, config and tokenizer belong together.

    Args:
        run: see `find_run`.
        step: None: the newest.
        device: auto: CUDA, else MPS, else the CPU.
        dtype: to compute in; None: bfloat16 on CUDA of capability 8.0 and above, else float32. Matrices and embeddings
            are cast to it; vectors stay float32, as in training.

    Raises:
        UserError: no such run or step, or a checkpoint that is corrupt or inconsistent.
    """
    folder = find_run(run)
    target = distributed.choose_device(str(device), 0) if str(device) in ("auto", "cuda") else torch.device(device)
    dtype = dtype or distributed.choose_dtype("auto", target)
    checkpoints = folder / "checkpoints"
    step = manager.latest_step(checkpoints) if step is None else step
    try:
        params, meta, files = manager.load_params(checkpoints, step=step, device=target)
    except integrity.CorruptCheckpointError as error:
        others = [other for other in manager.steps(checkpoints) if other != step]
        raise UserError(f"{error}" + (f", or load it: --set step={others[-1]}" if others else "")) from error
    flat = tree.flatten(params)
    del params  # so that each leaf is freed when it has been cast
    label = f"checkpoint {checkpoints / str(step)}"
    tok = load_tokenizer(label, files)
    config = _trim_vocab(flat, infer_config(label, meta, flat), tok, label)
    for name, leaf in flat.items():
        flat[name] = leaf.to(dtype) if leaf.dim() >= 2 else leaf
    params = model.with_config(tree.unflatten(flat), config)
    return Pretrained(params, config, tok, folder.name, int(step or 0), str(meta.get("stage", "base")), folder)


def find_run(run: str | Path | None = None) -> Path:
    """Return the folder of a run that has a checkpoint.

    Args:
        run: a name under the base folder, or the path of a run's folder; None: the run that was saved last.

    Raises:
        UserError: no such run; lists the ones there are, or the command that makes one.
    """
    runs, available = runs_folder(), list_runs()
    if run is None:
        if available:
            return available[0]
        raise UserError(f"no trained model in {runs}: `{TRAIN_COMMAND}` makes one in minutes, without GPU or network")
    path = Path(run).expanduser().absolute()
    folder = path if (path / "checkpoints").is_dir() and not (runs / run).is_dir() else runs / run
    if not folder.is_dir():
        others = nearest(str(run), [path.name for path in available]) if available else ""
        raise UserError(f"run={run}: no such run in {runs}{others or f'; `{TRAIN_COMMAND}` makes one'}")
    if not manager.steps(folder / "checkpoints"):
        others = f"; other runs have: {', '.join(path.name for path in available)}" if available else ""
        raise UserError(
            f"run={run}: {folder} has no complete checkpoint: training has not saved one yet, or was stopped before "
            f"(repeat its command with --resume){others or f'; `{TRAIN_COMMAND}` makes one'}"
        )
    return folder


def runs_folder() -> Path:
    return base_dir() / "runs"


def list_runs() -> list[Path]:
    """Return the folders of the runs that have a checkpoint, the one that was saved last first.

    Raises:
        UserError: the folder of runs cannot be read.
    """
    try:
        folders = [path for path in runs_folder().iterdir() if manager.steps(path / "checkpoints")]
        return sorted(folders, key=_saved_at, reverse=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{runs_folder()} cannot be read ({error.strerror})") from error


def _saved_at(folder: Path) -> float:
    newest = folder / "checkpoints" / str(manager.latest_step(folder / "checkpoints"))
    written = newest / "meta" / "metadata"  # the folder's own time changes when metrics are added, or it is copied
    return (written if written.exists() else newest).stat().st_mtime


def describe_model(loaded: Pretrained) -> str:
    """Return a line for the log."""
    embedding, config = loaded.params["wte"], loaded.config
    return (
        f"{loaded.name}, step {loaded.step} ({loaded.stage}): {format_count(model.count(config)['total'])} parameters, "
        f"{config.vocab_size} tokens of vocabulary, context {config.sequence_len}, {embedding.device.type} "
        f"{str(embedding.dtype).removeprefix('torch.')}"
    )


def warning(loaded: Pretrained) -> str | None:
    """Return the warning to show before a conversation with a base model; None for other models."""
    if loaded.stage != "base":
        return None
    return (
        f"{loaded.name} is a base model: it was not trained on conversations, and continues your text rather than "
        "answers it; --experiment=chat --set complete=true completes plain text"
    )


def load_tokenizer(label: str, files: Mapping[str, Path]) -> Tokenizer:
    """Return the tokenizer among a checkpoint's files. Raises: UserError: it has none, or it lacks special tokens."""
    if tokenizer.TOKENS_FILE not in files:
        raise UserError(
            f"{label} has no tokenizer; for a converted checkpoint, convert again with --set ranks=… "
            "(see --experiment=convert --help)"
        )
    tok = tokenizer.load(files[tokenizer.TOKENS_FILE].parent)
    missing = [name for name in SPECIALS if name not in tok.specials]
    if missing:
        raise UserError(f"{label}: the tokenizer has no {missing[0]}; train it with `{tokenizer.TRAIN_COMMAND}`")
    return tok


def infer_config(label: str, meta: Mapping[str, Any], flat: Mapping[str, Tensor]) -> ModelConfig:
    """Return the config in a checkpoint's metadata. Raises: UserError: it is not that of the parameters."""
    try:
        config = ModelConfig(**meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{label}: no model config that this version knows ({error}); update nanochat?") from None
    expected = {name: tuple(row.shape) for name, row in model.spec(config).items()}
    actual = {name: tuple(leaf.shape) for name, leaf in flat.items()}
    for name in {**expected, **actual}:
        if expected.get(name) != actual.get(name):
            raise UserError(
                f"{label}: {name} is {actual.get(name, 'missing')}, its model has {expected.get(name, 'none')}; the "
                "checkpoint is not of this model"
            )
    return config


def _trim_vocab(flat: dict[str, Tensor], config: ModelConfig, tok: Tokenizer, label: str) -> ModelConfig:
    """Return the config with the tokenizer's vocabulary, and remove the embedding rows beyond it, in place.

    Those rows were never trained, and their ids stand for no text.
    """
    if tok.vocab_size > config.vocab_size:
        raise UserError(
            f"{label}: the tokenizer has {tok.vocab_size} tokens, the model {config.vocab_size}; they do not belong "
            "together"
        )
    config = dataclasses.replace(config, vocab_size=tok.vocab_size)
    for name, row in model.spec(config).items():
        if row.axes[0] == "vocab" and len(flat[name]) > row.shape[0]:
            flat[name] = flat[name][: row.shape[0]].clone()
    return config
