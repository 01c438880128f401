"""Checkpoints of the reference (karpathy/nanochat `model_*.pt`) to parameters and back."""

import base64
import dataclasses
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanochat import jsonl, model, tree
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.model import ModelConfig, Params
from nanochat.text import reason

# Our name -> the reference's; in a layer, without "layers.{i}." Other names are the same.
NAMES = {
    "wte": "transformer.wte.weight",
    "lm_head": "lm_head.weight",
    "smear_gate": "smear_gate.weight",
    "attn.q": "transformer.h.{i}.attn.c_q.weight",
    "attn.k": "transformer.h.{i}.attn.c_k.weight",
    "attn.v": "transformer.h.{i}.attn.c_v.weight",
    "attn.proj": "transformer.h.{i}.attn.c_proj.weight",
    "attn.value_gate": "transformer.h.{i}.attn.ve_gate.weight",
    "attn.value_embed": "value_embeds.{i}.weight",
    "mlp.fc": "transformer.h.{i}.mlp.c_fc.weight",
    "mlp.proj": "transformer.h.{i}.mlp.c_proj.weight",
}
# Values of the parameters that older checkpoints lack, by the end of the name.
NEUTRAL = {
    "resid_lambdas": 1.0,
    "x0_lambdas": 0.0,
    "smear_gate": 0.0,
    "smear_lambda": 0.0,
    "backout_lambda": 0.0,
    "value_embed": 0.0,
    "value_gate": 0.0,
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_FILES = {  # how they start
    rb"version https://git-lfs": "it is a Git LFS pointer; get the file with `git lfs pull`",
    rb"\s*<": "it is a web page",
    rb".{6}\0\0\s*{": "it is a safetensors file; use the reference's model_*.pt",
    rb"": "it is corrupt, or contains code, which is never run; download it again, or torch.save only its tensors",
}


def reference_name(name: str) -> str:
    return renamed(name, NAMES)


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Return the name of a parameter in another format; `names` are as NAMES, or hold every name."""
    if name in names or not name.startswith("layers."):
        return names.get(name, name)
    _, layer, rest = name.split(".", 2)
    return names[rest].format(i=layer)


def from_reference(state_dict: Mapping[str, Tensor], config: ModelConfig) -> Params:
    """Return the parameters of a reference state_dict, as copies.

    Parameters that older checkpoints lack get neutral values (residual weights 1, all else 0) and are printed.
    Embeddings keep the dtype of the file; everything else becomes float32.
    """
    given = {name.removeprefix("_orig_mod."): value.detach() for name, value in state_dict.items()}
    if len(given) < len(state_dict):
        raise UserError("reference checkpoint: it has a parameter twice, with _orig_mod. and without")
    params, filled = from_named(given, config, NAMES, "reference checkpoint", NEUTRAL)
    if filled:
        print(f"reference checkpoint: older format, neutral values for {', '.join(filled)}")
    return params


def from_named(
    given: Mapping[str, Tensor],
    config: ModelConfig,
    names: Mapping[str, str],
    source: str,
    neutral: Mapping[str, float] | None = None,
) -> tuple[Params, list[str]]:
    """Return the parameters of tensors under other names, as copies, and the names of those that were filled in.

    Embeddings keep their dtype; everything else becomes float32.

    Args:
        names: our names -> theirs, as NAMES.
        source: of the tensors, for errors.
        neutral: values of parameters that may be missing, by the end of their names.
    """
    if (last := renamed(f"layers.{config.n_layer - 1}.attn.q", names)) not in given:
        raise UserError(f"{source}: {last} is missing")
    for name, value in given.items():
        is_plain = value.layout is torch.strided and not (value.is_meta or value.is_nested or value.dtype not in DTYPES)
        if not is_plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            kind = f"{value.layout} {value.dtype} on {value.device}".replace("torch.", "")
            raise UserError(f"{source}: {name} ({kind}) does not hold float32, bfloat16 or float16 values")
    rows = {name: (renamed(name, names), row) for name, row in model.spec(config).items()}
    if extra := given.keys() - {theirs for theirs, _ in rows.values()}:
        raise UserError(f"{source}: {repr(min(extra))[1:-1]} is not of nanochat's GPT with {config.n_layer} layers")
    flat, filled = {}, []
    for name, (theirs, row) in rows.items():
        value, value_if_missing = given.get(theirs), (neutral or {}).get(name.rpartition(".")[2])
        if value is None:
            if value_if_missing is None:
                raise UserError(f"{source}: {theirs} is missing")
            value = torch.full(row.shape, value_if_missing)
            filled.append(name)
        if value.dim() == 0:  # older checkpoints have 0-d scalars
            value = value[None]
        if value.shape != row.shape:
            raise UserError(f"{source}: {theirs} has shape {tuple(value.shape)}, the config wants {row.shape}")
        flat[name] = value.clone() if row.embedding else value.float().clone()
    return model.with_config(tree.unflatten(flat), config), filled


def to_reference(params: Params, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Return the same tensors under the reference's names."""
    model.config_of(params, config)
    return {reference_name(name): value for name, value in tree.flatten(params).items()}


def save_reference(folder: Path, params: Params, tok: Tokenizer | None, *, step: int, stage: str) -> None:
    """Write model_*.pt and meta_*.json as karpathy/nanochat names them, and ranks.tiktoken, lines `base64 rank`."""
    config = model.config_of(params)
    torch.save({name: x.contiguous() for name, x in to_reference(params).items()}, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "stage": stage, "model_config": dataclasses.asdict(config)}
    jsonl.write_atomic(folder / f"meta_{step:06d}.json", json.dumps(meta, indent=1) + "\n")
    if tok:
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tok.tokens)]
        jsonl.write_atomic(folder / "ranks.tiktoken", "".join(lines))


def config_from_reference(model_config: Mapping[str, object]) -> ModelConfig:
    """Return the config of a meta file's `model_config`; the window pattern of older files is L."""
    if "window_pattern" not in model_config:
        print("reference checkpoint: older format, window_pattern L")
    return config_from({"window_pattern": "L", **model_config}, "reference checkpoint: its model_config")


def config_from(fields: Mapping[str, object], source: str, names: Mapping[str, str] | None = None) -> ModelConfig:
    """Return the config in the fields of a file; `names` are theirs by ours, `source` is for errors."""
    known = {}
    for field in dataclasses.fields(ModelConfig):
        name = (names or {}).get(field.name, field.name)
        if name not in fields:
            raise UserError(f"{source} has no {name}")
        known[field.name] = fields[name]
        if type(fields[name]) is not type(field.default):
            value, kind = repr(fields[name])[:100], type(field.default).__name__
            raise UserError(f"{source} has {name}={value}, expected {kind}")
    try:
        return ModelConfig(**known)
    except ValueError as error:
        raise UserError(f"{source.partition(': ')[0]}: {error}") from None


def load_reference(path: Path, config: ModelConfig) -> Params:
    """Read the parameters in a `.pt` file; pickled code is refused."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch compares no checksum, and unpacks any size
                if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():
                    raise ValueError
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except Exception:  # torch raises many types, and advises to disable weights_only
        with path.open("rb") as file:
            start = file.read(64)
        problem = next(text for prefix, text in OTHER_FILES.items() if re.match(prefix, start, re.DOTALL))
        raise UserError(f"{path}: not a file of plain tensors: {problem}") from None
    if not isinstance(state_dict, Mapping):
        raise UserError(f"{path}: not a state_dict (a mapping of names to tensors)")
    for name, value in state_dict.items():
        if not isinstance(name, str) or type(value) not in (Tensor, torch.nn.Parameter):
            kind = f"{repr(name)[:100]} is a {type(value).__name__}"
            raise UserError(f"{path}: not a state_dict (a mapping of names to tensors): {kind}")
    try:
        return from_reference(state_dict, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
