"""A trained model, ready to use: parameters, shape and tokenizer, read from a run's checkpoint.

    from nanochat import pretrained
    bot = pretrained.load("quickstart")        # or a path; without an argument, the run that was saved last

Everything comes out of the checkpoint itself, the tokenizer included: a tokenizer that was trained anew since, or a
setting that has changed, makes no difference to a model that was made before.
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
    """A model with what it takes to use it.

    Attributes:
        params: in the dtype to compute in, on the device. config: their shape.
        tokenizer: the one that the model was trained with.
        name, step, stage: of the run that made it; the stage is base, mid, sft or rl.
        folder: of the run.
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
    """Read a checkpoint, and check that parameters, shape and tokenizer belong together.

    Args:
        run: name of a run under the base folder, or path of a run's folder; None: the run that was saved last.
        step: of the checkpoint; None: the newest.
        device: where the parameters go; auto: CUDA, else MPS, else the CPU.
        dtype: to compute in; None: bfloat16 on CUDA of capability 8.0 and above, else float32. Matrices and tables are
            cast to it once, as the model would cast them at each use; vectors stay float32, as in training.

    Raises:
        UserError: there is no such run or step, nothing is saved yet, or what is saved is damaged or does not fit
            together; names the runs that there are, or the command that makes one.
    """
    folder = find_run(run)
    place = distributed.choose_device(str(device), 0) if str(device) in ("auto", "cuda") else torch.device(device)
    dtype = dtype or distributed.choose_dtype("auto", place)
    checkpoints = folder / "checkpoints"
    step = manager.latest_step(checkpoints) if step is None else step
    try:
        params, meta, files = manager.load_params(checkpoints, step=step, device=place)
    except integrity.CorruptCheckpointError as error:
        others = [other for other in manager.steps(checkpoints) if other != step]
        raise UserError(f"{error}" + (f", or load it: --set step={others[-1]}" if others else "")) from error
    flat = tree.flatten(params)
    del params  # each leaf goes when it has been cast
    where = f"checkpoint {checkpoints / str(step)}"
    tok = load_tokenizer(where, files)
    config = _without_spare_rows(flat, infer_config(where, meta, flat), tok, where)
    for name, leaf in flat.items():
        flat[name] = leaf.to(dtype) if leaf.dim() >= 2 else leaf
    stage = str(meta.get("stage", "base"))
    return Pretrained(
        model.with_config(tree.unflatten(flat), config), config, tok, folder.name, int(step or 0), stage, folder
    )


def find_run(run: str | Path | None = None) -> Path:
    """Return the folder of a run that has a checkpoint.

    Args:
        run: its name, or the path of its folder; None: the run that was saved last.

    Raises:
        UserError: there is none; says which there are, or the command that makes one.
    """
    runs = runs_folder()
    there = list_runs()
    if run is None:
        if there:
            return there[0]
        raise UserError(f"no trained model in {runs}: `{TRAIN_COMMAND}` makes one in minutes, without GPU or network")
    path = Path(run).expanduser().absolute()
    folder = path if (path / "checkpoints").is_dir() and not (runs / run).is_dir() else runs / run
    if not folder.is_dir():
        others = nearest(str(run), [path.name for path in there]) if there else ""
        raise UserError(f"run={run}: no such run in {runs}{others or f'; `{TRAIN_COMMAND}` makes one'}")
    if not manager.steps(folder / "checkpoints"):
        others = f"; other runs have: {', '.join(path.name for path in there)}" if there else ""
        raise UserError(
            f"run={run}: {folder} has no complete checkpoint: it is not that far yet, or was stopped before the first "
            f"was saved (the command that trains it goes on with --resume){others or f'; `{TRAIN_COMMAND}` makes one'}"
        )
    return folder


def runs_folder() -> Path:
    """Return the folder of all runs."""
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


def describe_model(bot: Pretrained) -> str:
    """Return what the model is, in one line."""
    counts = model.count(bot.config)["total"]
    embedding = bot.params["wte"]
    place = f"{embedding.device.type} {str(embedding.dtype).removeprefix('torch.')}"
    return (
        f"{bot.name}, step {bot.step} ({bot.stage}): {format_count(counts)} parameters, {bot.config.vocab_size} tokens "
        f"of vocabulary, context {bot.config.sequence_len}, {place}"
    )


def warning(bot: Pretrained) -> str | None:
    """Return the line that a person should read before a conversation with a base model; None for any other."""
    if bot.stage != "base":
        return None
    return (
        f"{bot.name} is a base model: it has never seen a conversation, and goes on with your text rather than answers "
        "it; --experiment=generate completes plain text"
    )


def _saved_at(folder: Path) -> float:
    newest = folder / "checkpoints" / str(manager.latest_step(folder / "checkpoints"))
    written = newest / "meta" / "metadata"  # the time of the folder changes when metrics are added, or it is copied
    return (written if written.exists() else newest).stat().st_mtime


def load_tokenizer(where: str, files: Mapping[str, Path]) -> Tokenizer:
    """Return the tokenizer in a checkpoint's files. Raises: UserError: it has none, or one without a special token."""
    if tokenizer.TOKENS_FILE not in files:
        raise UserError(
            f"{where} has no tokenizer, so its tokens mean nothing; one that was converted gets it by converting again "
            "with --set ranks=… (see --experiment=convert --help)"
        )
    tok = tokenizer.load(files[tokenizer.TOKENS_FILE].parent)
    missing = [name for name in SPECIALS if name not in tok.specials]
    if missing:
        raise UserError(f"{where}: the tokenizer has no {missing[0]}; train it with `{tokenizer.TRAIN_COMMAND}`")
    return tok


def infer_config(where: str, meta: Mapping[str, Any], flat: Mapping[str, Tensor]) -> ModelConfig:
    """Return the shape that a checkpoint states, once it is seen to be that of its parameters. Raises: UserError."""
    try:
        config = ModelConfig(**meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: no shape of a model that this nanochat knows ({error}); update nanochat?") from None
    wanted = {name: tuple(row.shape) for name, row in model.spec(config).items()}
    found = {name: tuple(leaf.shape) for name, leaf in flat.items()}
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where}: {name} is {found.get(name, 'missing')}, its model has {wanted.get(name, 'none')}; the "
                "checkpoint is not of this model"
            )
    return config


def _without_spare_rows(flat: dict[str, Tensor], config: ModelConfig, tok: Tokenizer, where: str) -> ModelConfig:
    """Return the shape with the tokenizer's vocabulary, and cut from the tables in `flat` what is beyond it.

    A model may be made with a larger vocabulary than its tokenizer has. The rest was never trained, and a token out of
    it would stand for no text.
    """
    if tok.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tok.vocab_size} tokens, the model {config.vocab_size}; they do not belong "
            "together"
        )
    config = dataclasses.replace(config, vocab_size=tok.vocab_size)
    for name, row in model.spec(config).items():
        if row.axes[0] == "vocab" and len(flat[name]) > row.shape[0]:
            flat[name] = flat[name][: row.shape[0]].clone()
    return config
