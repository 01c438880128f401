"""Tensors as safetensors files, several with an index where they are large, and a model under its own names."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nanochat import jsonl, model, tree
from nanochat.checkpoint import convert
from nanochat.config import UserError
from nanochat.data import Tokenizer, tokenizer
from nanochat.model import Params
from nanochat.text import reason

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_SIZE = "5GB"
FORMAT = "nanochat-safetensors-1"


def save(folder: Path, params: Params, tok: Tokenizer | None, *, step: int, stage: str) -> None:
    """Write a model into an empty folder: its tensors, config.json, and tokenizer.txt if it has a tokenizer."""
    write(folder, tree.flatten(params))
    content = {"format": FORMAT, "model": dataclasses.asdict(model.config_of(params)), "step": step, "stage": stage}
    jsonl.write_atomic(folder / "config.json", json.dumps(content, indent=1) + "\n")
    if tok:
        tokenizer.save(tok, folder)


def load(folder: Path) -> tuple[Params, Tokenizer | None, dict[str, object]]:
    """Return the model that `save` wrote, and its config.json."""
    settings = json_object(folder / "config.json")
    fields = settings.get("model")
    source = f"{folder / 'config.json'}: its model"
    config = convert.config_from(fields if isinstance(fields, dict) else {}, source)
    params, _ = convert.from_named(read(folder), config, {name: name for name in model.spec(config)}, str(folder))
    has_tokenizer = (folder / tokenizer.TOKENS_FILE).exists()
    return params, tokenizer.load(folder) if has_tokenizer else None, settings


def write(folder: Path, tensors: Mapping[str, Tensor], shard_size: int | str = SHARD_SIZE) -> None:
    """Write model.safetensors, or above `shard_size` (bytes, or text such as "5GB") shards and their index."""
    import huggingface_hub
    import safetensors  # noqa: F401  (huggingface_hub imports it, with an error of its own)

    own = {name: value.detach().contiguous() for name, value in tensors.items()}
    huggingface_hub.save_torch_state_dict(own, folder, max_shard_size=shard_size, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner only


def read(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder that `write` or transformers wrote; an error names file and tensor."""
    import safetensors
    import safetensors.torch

    files, listed = [FILE], None
    if (folder / INDEX).exists():
        listed = json_object(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise UserError(f"{folder / INDEX}: has no weight_map")
        files = sorted(set(listed.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{folder / INDEX}: names {file!r}, which is not a file of this folder")
        try:
            loaded = safetensors.torch.load_file(folder / file)
        except OSError as error:
            raise UserError(f"{folder / file}: cannot be read ({reason(error)})") from None
        except safetensors.SafetensorError as error:
            raise UserError(f"{folder / file}: not a safetensors file, or a truncated one ({reason(error)})") from None
        if listed is not None and (odd := [n for n in loaded if listed.get(n) != file]):
            raise UserError(f"{folder / file}: holds {odd[0]}, which the index does not place there")
        tensors |= loaded
    if listed is not None and (missing := listed.keys() - tensors.keys()):
        raise UserError(f"{folder / str(listed[min(missing)])}: has no {min(missing)}, which the index places there")
    return tensors


def json_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file."""
    try:
        value = json.loads(jsonl.read_text(path))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
