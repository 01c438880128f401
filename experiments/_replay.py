"""The batches of a run's steps, again: from the settings and the loader's state in its checkpoints.

The rows of a step depend on the data, the seed and the settings, not on the number of ranks or on when a run was
resumed. What a run recorded in its checkpoints and in metrics.jsonl is compared with what is read now.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import sft
from nanochat import checkpoint, data, metrics, model, tasks, train
from nanochat.config import Settings, UserError
from nanochat.data import DataConfig

if TYPE_CHECKING:
    from torch import Tensor


COUNTS = ("docs", "tokens_packed", "learned_tokens")  # of a batch's statistics: they differ where the rows do


class Step(NamedTuple):
    """What a step was trained on."""

    number: int  # counted from 1, as in metrics.jsonl
    batch: dict[str, Tensor]  # of all ranks: {"inputs", "targets"}, and of fine-tuning "weights", (B, T)
    stats: Mapping[str, float]
    meta: Mapping[str, Any]  # of the checkpoint whose settings it was trained with


def restore_config(config: Any, saved: Mapping[str, Any], prefix: str = "") -> Any:
    """Return `config`, a dataclass of settings, with what a checkpoint's {dotted name: JSON value} has of them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if isinstance(value, Settings):
            values[field.name] = restore_config(value, saved, f"{name}.")
        elif name in saved:
            values[field.name] = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
    return dataclasses.replace(config, **values)


def steps_after(folder: Path, done: int, device: Any = "cpu") -> Iterator[Step]:
    """Yield the steps that a run took, or would take, after its first `done` ones.

    A UserError says why the batch of a step cannot be made again.
    """
    saved = checkpoint.steps(folder / "checkpoints")
    # Settings may change when a run is resumed: a step was trained with those that the next checkpoint has.
    meta = checkpoint.inspect(folder, next((step for step in saved if step > done), saved[-1])).meta
    name, settings, stage = folder.name, meta.get("config", {}), str(meta.get("stage", "base"))
    if "loader" not in meta:
        raise UserError(f"run {name} was not trained here: it has no data on record")
    if stage not in ("base", "mid", "sft"):
        raise UserError(f"run {name} is of stage {stage}: what the model wrote or compared there is not stored")
    base, begins = checkpoint.split_step(settings.get("init_from"))
    if begins is not None and done < begins:
        raise UserError(f"run {name} begins after step {begins} of {base}: --set run={base} has its step {done + 1}")
    at = max([step for step in saved if step <= done], default=begins or 0)
    source = folder if at in saved else checkpoint.find_run(base) if base else folder
    state = read_state(source, at) if at else None
    try:
        stream = open_stream(folder, meta, state, device)
    except data.loader.OtherDataError as error:
        if source == folder:
            raise UserError(f"step {done + 1} of {name} cannot be read again: {error}") from None
        stream = open_stream(folder, meta, None, device)  # as the branch did
    recorded = {row["step"]: row for row in metrics.logger.read(folder) if "train/loss" in row}
    was = made_of(meta["loader"])
    with contextlib.closing(stream), metrics.progress.Bar(done, initial=at, label=f"reading the data of {name}") as bar:
        for number, (batch, after, stats) in enumerate(stream, start=at + 1):
            now = made_of(after["position"])
            changes = [f"{key} was {x}, is {now[key]}" for key, x in was.items() if now.get(key, x) != x]
            counts = {
                key: recorded[number].get(f"train/{key}") for key in COUNTS if key in stats and number in recorded
            }
            changes += [f"{k} was {n:,}, is {stats[k]:,}" for k, n in counts.items() if n not in (None, stats[k])]
            if number == meta["progress"]["step"] and after["position"] != meta["loader"]:
                changes.append("the place in the data is not that of the checkpoint")
            if changes:
                raise UserError(
                    f"step {number} of {name}: its data or settings have changed since ({'; '.join(changes)})"
                )
            if number > done:
                yield Step(number, batch, stats, meta)
            else:
                bar.update()


def with_weights(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with each target's weight in its mean loss; the losses of its parts then sum up to it."""
    counted = batch["targets"] != model.IGNORE
    return {**batch, "weights": counted / counted.sum()}


def made_of(position: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the rows by the state of a loader: of each source, where it mixes several."""
    sources = position.get("sources", [position])
    return {f"{s['source']}: {key}" if "source" in s else key: x for s in sources for key, x in s["made_of"].items()}


def read_state(folder: Path, step: int) -> Any:
    """Return the state that the loader of a run had after a step."""
    meta, arrays = checkpoint.load_arrays(folder / "checkpoints", step)
    return {"position": meta["loader"], **{n.removeprefix("loader_"): array for n, array in arrays.items()}}


def open_stream(folder: Path, meta: Mapping[str, Any], state: Any, device: Any) -> Generator[Any, None, None]:
    """Return the loader of a run, for all of its ranks together, as its stage opens it."""
    saved, length = meta["config"], meta["model"]["sequence_len"]
    tok = checkpoint.load_tokenizer(checkpoint.inspect(folder))
    rows = saved["total_batch_size"] // length
    if meta["stage"] == "base":
        config = restore_config(DataConfig(), saved, "data.")
        return data.loader.batches(
            config, tok, split="train", rows_per_step=rows, sequence_len=length, seed=saved["seed"], state=state,
            device=device,
        )  # fmt: skip
    config = restore_config(sft.Config(), saved)
    parts, missing = sft.load_tasks(config.tasks, config.source)
    if missing:
        raise UserError(f"run {folder.name}: {', '.join(missing)} cannot be read again: {next(iter(missing.values()))}")
    epochs = None if config.num_iterations else 1
    packing = train.Packing(rows, rows, length, config.assistant_only, config.long_conversations, epochs)
    packing = packing._replace(buffer_conversations=config.buffer_conversations)
    task = tasks.mixture(parts, name=",".join(config.tasks))
    return train.sft.batches(task, tok, packing, state=state, device=device)
