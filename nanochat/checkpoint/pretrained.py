"""Load a trained model from a run: `checkpoint.load("quickstart")`, a path, or nothing for the run saved last.

Everything is read from the checkpoint, so later changes of the settings or the tokenizer do not affect a model.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import distributed, model, tree
from nanochat.checkpoint import integrity, manager
from nanochat.config import UserError, base_dir, nearest
from nanochat.data import Tokenizer, tokenizer
from nanochat.model import ModelConfig, Params
from nanochat.text import format_count, reason

TRAIN_COMMAND = "python launch.py --experiment=quickstart"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A trained model and its run; the parameters carry the config and have the dtype to compute in."""

    params: Params = dataclasses.field(repr=False)
    config: ModelConfig
    tokenizer: Tokenizer
    name: str
    step: int
    stage: str  # base, mid, sft or rl
    folder: Path


class CheckpointInfo(NamedTuple):
    """What a checkpoint says about itself."""

    folder: Path  # of the run
    path: Path  # of the step
    step: int
    stage: str  # base, mid, sft or rl
    meta: Mapping[str, Any]  # as it was given to `save`
    state: integrity.Specs  # "params.wte" → shape, dtype and fingerprint
    files: integrity.Specs


def load(
    run: str | Path | None = None,
    *,
    step: int | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
) -> Pretrained:
    """Read a model, and check that parameters, config and tokenizer belong together.

    Args:
        run, step: see `find_run` and `split_step`; None: the newest.
        device, dtype: see `LoadConfig`. Matrices and embeddings are cast to the dtype; vectors stay float32, as in
            training.
    """
    run, step = split_step(run, step)
    folder = find_run(run)
    saved = manager.steps(folder / "checkpoints")
    step = saved[-1] if step is None else step
    target = distributed.choose_device(str(device), 0) if str(device) in ("auto", "cuda") else torch.device(device)
    dtype = dtype or distributed.choose_dtype("auto", target)
    try:
        info = inspect(folder, step)
        tok, config = load_tokenizer(info), infer_config(info)
        params, _, _ = manager.load_params(folder / "checkpoints", step=step, device=target)
    except integrity.CorruptCheckpointError as error:
        others = [other for other in saved if other != step]
        raise UserError(f"{error}" + (f", or load it: --set step={others[-1]}" if others else "")) from error
    if tok.vocab_size > config.vocab_size:
        raise UserError(
            f"checkpoint {info.path}: the tokenizer has {tok.vocab_size} tokens, the model {config.vocab_size}; they "
            "do not belong together"
        )
    config = dataclasses.replace(config, vocab_size=tok.vocab_size)
    flat = tree.flatten(params)
    del params  # so that each leaf is freed when it has been cast
    for name, row in model.spec(config).items():
        if flat[name].shape != row.shape:  # embedding rows without a token were never trained
            flat[name] = flat[name][: row.shape[0]].clone()
        flat[name] = flat[name].to(dtype) if flat[name].dim() >= 2 else flat[name]
    return Pretrained(
        model.with_config(tree.unflatten(flat), config), config, tok, folder.name, step, info.stage, folder
    )


def inspect(run: str | Path | None = None, step: int | None = None) -> CheckpointInfo:
    """Return what a checkpoint (of `find_run(run)`; by default the newest step) says about itself."""
    run, step = split_step(run, step)
    folder = find_run(run)
    path = manager.step_path(folder / "checkpoints", step)
    header = integrity.read_header(path)
    stage = str(header["meta"].get("stage", "base"))
    return CheckpointInfo(folder, path, int(path.name), stage, header["meta"], header["state"], header["files"])


def load_tokenizer(info: CheckpointInfo) -> Tokenizer:
    if tokenizer.TOKENS_FILE not in info.files:
        raise UserError(
            f"checkpoint {info.path} has no tokenizer; for a converted checkpoint, convert again with --set ranks=… "
            "(see --experiment=convert --help)"
        )
    files = integrity.check_files(info.path, info.files)
    return tokenizer.load(files[tokenizer.TOKENS_FILE].parent)


def infer_config(info: CheckpointInfo) -> ModelConfig:
    """Return the model config in a checkpoint's metadata, checked against the shapes of its parameters or adapters."""
    try:
        config = ModelConfig(**info.meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"checkpoint {info.path}: no model config that this version knows ({error}); update nanochat?"
        ) from None
    saved = {name: {"shape": spec["shape"]} for name, spec in info.state.items() if name.startswith("params.")}
    low_rank = info.meta.get("lora")
    rows = model.lora.spec(config, low_rank["rank"], low_rank["targets"]) if low_rank else model.spec(config)
    expected = {f"params.{name}": {"shape": row.shape} for name, row in rows.items()}
    integrity.compare_specs(info.path, saved, expected)
    return config


def find_run(run: str | Path | None = None) -> Path:
    """Return the folder of a run that has a checkpoint, by name or path; None: of the run that was saved last."""
    runs, available = runs_folder(), list_runs()
    names = [folder.name for folder in available]
    if run is None:
        if available:
            return available[0]
        raise UserError(f"no trained model in {runs}: `{TRAIN_COMMAND}` makes one in minutes, without GPU or network")
    path = Path(run).expanduser().absolute()
    folder = path if (path / "checkpoints").is_dir() and not (runs / run).is_dir() else runs / run
    if not folder.is_dir():
        others = nearest(str(run), names) if names else f"; `{TRAIN_COMMAND}` makes one"
        raise UserError(f"run={run}: no such run in {runs}{others}")
    if not manager.steps(folder / "checkpoints"):
        others = f"other runs have: {', '.join(names)}" if names else f"`{TRAIN_COMMAND}` makes one"
        raise UserError(
            f"run={run}: {folder} has no complete checkpoint: training has not saved one yet, or was stopped before "
            f"(repeat its command with --resume); {others}"
        )
    return folder


def split_step(run: str | Path | None, step: int | None = None) -> tuple[str | Path | None, int | None]:
    """Return run and step of `run@step`, unless that is a run's own name; any other run and `step` as they are."""
    name, _, number = str(run or "").rpartition("@")
    if not name or not re.fullmatch("[0-9]+", number) or (runs_folder() / str(run)).is_dir() or Path(str(run)).is_dir():
        return run, step
    if step not in (None, int(number)):
        raise UserError(f"run={run} and step={step}: set one of the two steps")
    return name, int(number)


def runs_folder() -> Path:
    return base_dir() / "runs"


def list_runs() -> list[Path]:
    """Return the folders of the runs that have a checkpoint, the one that was saved last first."""
    try:
        folders = [path for path in runs_folder().iterdir() if manager.steps(path / "checkpoints")]
        return sorted(folders, key=_saved_at, reverse=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{runs_folder()} cannot be read ({reason(error)})") from error


def _saved_at(folder: Path) -> float:
    newest = folder / "checkpoints" / str(manager.latest_step(folder / "checkpoints"))
    written = newest / "meta" / "metadata"  # the folder's own time changes when metrics are added, or it is copied
    return (written if written.exists() else newest).stat().st_mtime


def describe_model(loaded: Pretrained) -> str:
    embedding, config = loaded.params["wte"], loaded.config
    return (
        f"{loaded.name}, step {loaded.step} ({loaded.stage}): {format_count(model.count(config)['total'])} parameters, "
        f"{config.vocab_size} tokens of vocabulary, context {config.sequence_len}, {embedding.device.type} "
        f"{str(embedding.dtype).removeprefix('torch.')}"
    )


def warning(loaded: Pretrained) -> str | None:
    """Return the warning to show before a conversation with a base model; None for other models."""
    problem = "it was not trained on conversations, and continues your text rather than answers it"
    fix = "--experiment=chat --set complete=true completes plain text"
    return f"{loaded.name} is a base model: {problem}; {fix}" if loaded.stage == "base" else None
