"""Reference checkpoints (karpathy/nanochat `model_*.pt`) to parameters and back."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanochat import model, tree
from nanochat.config import UserError
from nanochat.model import ModelConfig, Params

# Reference name (i stands for the layer) -> ours; everything else keeps its name.
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
    """Return our name of a reference parameter.

    Raises:
        UserError: the reference has no such parameter.
    """
    name = name.removeprefix("_orig_mod.")
    if name in NEUTRAL:
        return name
    layer = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".i.", name, count=1)
    if pattern not in NAMES:
        raise UserError(f"reference checkpoint: unknown parameter {name!r}; it is not of nanochat's GPT")
    return NAMES[pattern].replace(".i.", f".{layer[1]}." if layer else "")


def from_reference(state_dict: Mapping[str, Tensor], config: ModelConfig) -> Params:
    """Return the parameters of a reference state_dict.

    Parameters that an older checkpoint lacks get values without effect (residual weights 1, x0 weights 0, no smear,
    no backout, no value embeddings), and a printed line names them. Matrices become float32 masters; the embedding
    tables keep the dtype of the file.

    Raises:
        UserError: a parameter is unknown, is missing and has no neutral value, or has another shape.
    """
    given = {to_ours(name): value for name, value in state_dict.items()}
    rows = model.spec(config)
    if surplus := sorted(set(given) - set(rows)):
        raise UserError(f"reference checkpoint: {surplus[0]} does not belong to a model of {config.n_layer} layers")
    flat, filled = {}, []
    for name, row in rows.items():
        if name in given:
            value = given[name].detach()
            value = value[None] if value.dim() == 0 else value  # scalars of the reference's were once 0-d
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
    """Return the reference's state_dict of `params`: same tensors under the reference's names."""
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
    """Return the configuration of a reference meta file's `model_config`; window pattern L where it has none.

    Raises:
        UserError: another field is missing, or the fields make no model.
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
    """Read a reference `.pt` file (tensors only: pickled code is refused) as parameters.

    Raises:
        UserError: the file is absent, is no file of tensors, or does not fit the configuration.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # torch raises many kinds, and advises to switch its guard off
        raise UserError(
            f"{path}: not a file of plain tensors: it is damaged, or has code in it, which is never run; "
            "get the file again, or save its tensors alone with torch.save"
        ) from None
    if not isinstance(state_dict, Mapping) or not all(isinstance(x, Tensor) for x in state_dict.values()):
        raise UserError(f"{path}: no state_dict, that is, no mapping of names to tensors")
    return from_reference(state_dict, config)
