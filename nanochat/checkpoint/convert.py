"""Checkpoints of the reference (karpathy/nanochat `model_*.pt`) to parameters and back."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanochat import model, tree
from nanochat.config import UserError
from nanochat.model import ModelConfig, Params

# Reference name (i is the layer) -> ours; other names are the same.
NAMES = {
    "transformer.wte.weight": "wte",
    "lm_head.weight": "lm_head",
    "smear_gate.weight": "smear_gate",
    "transformer.h.i.attn.c_q.weight": "layers.i.attn.q",
    "transformer.h.i.attn.c_k.weight": "layers.i.attn.k",
    "transformer.h.i.attn.c_v.weight": "layers.i.attn.v",
    "transformer.h.i.attn.c_proj.weight": "layers.i.attn.proj",
    "transformer.h.i.attn.ve_gate.weight": "layers.i.attn.value_gate",
    "transformer.h.i.mlp.c_fc.weight": "layers.i.mlp.fc",
    "transformer.h.i.mlp.c_proj.weight": "layers.i.mlp.proj",
    "value_embeds.i.weight": "layers.i.attn.value_embed",
}
NEUTRAL = {"resid_lambdas": 1.0, "x0_lambdas": 0.0, "smear_gate": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0}


def to_ours(name: str) -> str:
    """Return our name of a reference parameter. Raises: UserError: unknown name."""
    name = name.removeprefix("_orig_mod.")
    if name in NEUTRAL:
        return name
    layer = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".i.", name, count=1)
    if pattern not in NAMES:
        raise UserError(f"reference checkpoint: unknown parameter {name!r}; it is not of nanochat's GPT")
    return NAMES[pattern].replace(".i.", f".{layer[1]}." if layer else "")


def from_reference(state_dict: Mapping[str, Tensor], config: ModelConfig) -> Params:
    """Return the parameters of a reference state_dict, as copies.

    Parameters that older checkpoints lack get neutral values (residual weights 1, all else 0) and are printed.
    Embeddings keep the dtype of the file; everything else becomes float32.

    Raises:
        UserError: a parameter is unknown, has the wrong shape, or is missing without a neutral value.
    """
    given = {to_ours(name): value for name, value in state_dict.items()}
    rows = model.spec(config)
    if extra := sorted(set(given) - set(rows)):
        raise UserError(f"reference checkpoint: {extra[0]} does not belong to a model of {config.n_layer} layers")
    flat, filled = {}, []
    for name, row in rows.items():
        if name in given:
            value = given[name].detach()
            value = value[None] if value.dim() == 0 else value  # older checkpoints have 0-d scalars
        else:
            value = torch.full(row.shape, _neutral(name))
            filled.append(name)
        if tuple(value.shape) != row.shape:
            raise UserError(
                f"reference checkpoint: {name} has shape {tuple(value.shape)}, the config wants {row.shape}"
            )
        flat[name] = value.clone() if row.embedding else value.float().clone()
    if filled:
        print(f"reference checkpoint: older format, neutral values for {', '.join(filled)}")
    return model.with_config(tree.unflatten(flat), config)


def _neutral(name: str) -> float:
    if name in NEUTRAL:
        return NEUTRAL[name]
    if name.endswith(("value_embed", "value_gate")):
        return 0.0
    raise UserError(f"reference checkpoint: {name} is missing")


def to_reference(params: Params, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Return the same tensors under the reference's names."""
    model.config_of(params, config)
    back = {ours: reference for reference, ours in NAMES.items()}
    state_dict = {}
    for name, value in tree.flatten(params).items():
        layer = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".i.", name, count=1)
        reference = back.get(pattern, name)
        state_dict[reference.replace(".i.", f".{layer[1]}.") if layer else reference] = value
    return state_dict


def config_from_reference(model_config: Mapping[str, object]) -> ModelConfig:
    """Return the config of a meta file's `model_config`; the window pattern of older files is L.

    Raises:
        UserError: a field is missing or invalid.
    """
    known = {field: model_config[field] for field in ModelConfig.__dataclass_fields__ if field in model_config}
    if "window_pattern" not in known:
        print("reference checkpoint: older format, window_pattern L")
        known["window_pattern"] = "L"
    if missing := [field for field in ModelConfig.__dataclass_fields__ if field not in known]:
        raise UserError(f"reference checkpoint: its model_config has no {missing[0]}")
    try:
        return ModelConfig(**known)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        raise UserError(f"reference checkpoint: {error}") from None


def load_reference(path: Path, config: ModelConfig) -> Params:
    """Read the parameters in a `.pt` file; pickled code is refused.

    Raises:
        UserError: the file does not exist, holds more than tensors, or does not match the config.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # torch raises many types, and advises to disable weights_only
        raise UserError(
            f"{path}: not a file of plain tensors: it is corrupt, or contains code, which is never run; "
            "download it again, or save only its tensors with torch.save"
        ) from None
    if not isinstance(state_dict, Mapping) or not all(isinstance(x, Tensor) for x in state_dict.values()):
        raise UserError(f"{path}: not a state_dict (a mapping of names to tensors)")
    return from_reference(state_dict, config)
