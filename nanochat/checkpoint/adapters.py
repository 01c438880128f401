"""Checkpoints of adapters hold no base: where it is, and the fingerprint by which it is recognized."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat.checkpoint import integrity, storage
from nanochat.config import UserError


def base_reference(run: Path, step: int) -> dict[str, Any]:
    """Return {"run": path, "step", "fingerprint"} of a checkpoint to train adapters on, as JSON values."""
    header = integrity.read_header(run / "checkpoints" / str(step))
    return {"run": str(run), "step": step, "fingerprint": fingerprint(header)}


def fingerprint(header: Mapping[str, Any]) -> str:
    """Return the fingerprint of the model in a checkpoint: of its parameters, and of the base if it has one."""
    leaves = {name: leaf["fingerprint"] for name, leaf in header["state"].items() if name.startswith("params.")}
    base = header["meta"].get("lora", {}).get("base", {}).get("fingerprint")
    return hashlib.sha256(json.dumps([leaves, base], sort_keys=True).encode()).hexdigest()[:32]


def find_base(run: Path, base: Mapping[str, Any]) -> Path:
    """Return the run that holds the base of `run`, given by `base_reference`: where it was, or beside `run`.

    Raises UserError if it is in neither place, or has changed.
    """
    recorded = Path(base["run"])
    places = dict.fromkeys((recorded, run.parent / recorded.name))
    name = f"run {run.name} needs its base, step {base['step']} of run {recorded.name}, which"
    changed = []
    for place in places:
        if base["step"] in storage.steps(place / "checkpoints"):
            if fingerprint(integrity.read_header(place / "checkpoints" / str(base["step"]))) == base["fingerprint"]:
                return place
            changed.append(place)
    if changed:
        raise UserError(f"{name} has changed in {changed[0]}: put the original back, or train {run.name} again")
    raise UserError(f"{name} is not in {' or '.join(map(str, places))}: put it there")
