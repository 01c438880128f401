"""Checkpoints of the reference (karpathy/nanochat `model_*.pt`) to parameters and back."""

import dataclasses
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanochat import model, tree
from nanochat.config import UserError
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
    if not name.startswith("layers."):
        return NAMES.get(name, name)
    _, layer, rest = name.split(".", 2)
    return NAMES[rest].format(i=layer)


def from_reference(state_dict: Mapping[str, Tensor], config: ModelConfig) -> Params:
    """Return the parameters of a reference state_dict, as copies.

    Parameters that older checkpoints lack get neutral values (residual weights 1, all else 0) and are printed.
    Embeddings keep the dtype of the file; everything else becomes float32.
    """
    given = {name.removeprefix("_orig_mod."): value.detach() for name, value in state_dict.items()}
    if len(given) < len(state_dict):
        raise UserError("reference checkpoint: it has a parameter twice, with _orig_mod. and without")
    if (last := reference_name(f"layers.{config.n_layer - 1}.attn.q")) not in given:
        raise UserError(f"reference checkpoint: {last} is missing")
    for name, value in given.items():
        is_plain = value.layout is torch.strided and not (value.is_meta or value.is_nested or value.dtype not in DTYPES)
        if not is_plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            kind = f"{value.layout} {value.dtype} on {value.device}".replace("torch.", "")
            raise UserError(f"reference checkpoint: {name} ({kind}) does not hold float32, bfloat16 or float16 values")
    rows = model.spec(config)
    if extra := given.keys() - map(reference_name, rows):
        raise UserError(
            f"reference checkpoint: {repr(min(extra))[1:-1]} is not of nanochat's GPT with {config.n_layer} layers"
        )
    flat, filled = {}, []
    for name, row in rows.items():
        value, neutral = given.get(reference_name(name)), NEUTRAL.get(name.rpartition(".")[2])
        if value is None:
            if neutral is None:
                raise UserError(f"reference checkpoint: {reference_name(name)} is missing")
            value = torch.full(row.shape, neutral)
            filled.append(name)
        if value.dim() == 0:  # older checkpoints have 0-d scalars
            value = value[None]
        if value.shape != row.shape:
            raise UserError(
                f"reference checkpoint: {name} has shape {tuple(value.shape)}, the config wants {row.shape}"
            )
        flat[name] = value.clone() if row.embedding else value.float().clone()
    if filled:
        print(f"reference checkpoint: older format, neutral values for {', '.join(filled)}")
    return model.with_config(tree.unflatten(flat), config)


def to_reference(params: Params, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Return the same tensors under the reference's names."""
    model.config_of(params, config)
    return {reference_name(name): value for name, value in tree.flatten(params).items()}


def config_from_reference(model_config: Mapping[str, object]) -> ModelConfig:
    """Return the config of a meta file's `model_config`; the window pattern of older files is L."""
    known = {field: model_config[field] for field in ModelConfig.__dataclass_fields__ if field in model_config}
    if "window_pattern" not in known:
        print("reference checkpoint: older format, window_pattern L")
        known["window_pattern"] = "L"
    for field in dataclasses.fields(ModelConfig):
        if field.name not in known:
            raise UserError(f"reference checkpoint: its model_config has no {field.name}")
        if type(known[field.name]) is not type(field.default):
            value, kind = repr(known[field.name])[:100], type(field.default).__name__
            raise UserError(f"reference checkpoint: its model_config has {field.name}={value}, expected {kind}")
    try:
        return ModelConfig(**known)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(f"reference checkpoint: {error}") from None


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
