"""Prefill and one decode step as `torch.export` programs, for any batch and length, which run where only torch is.

    prefill(tokens_BT, length_B) -> logits_BV, cache       # T at least 2; rows are padded on the right to one length
    decode(tokens_B, cache)      -> logits_BV, cache       # one more token per row

The weights are inside; `cache` is that of `model.decode`, a nested dict of tensors. Source: the PyTorch documentation
of torch.export and of ahead-of-time Inductor.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat import jsonl, model, tree
from nanochat.config import UserError
from nanochat.model import Params, kv_cache


def save(folder: Path, params: Params, context: int, *, aot: bool = False) -> None:
    """Write prefill.pt2 and decode.pt2 into a folder, with `aot` also prefill_aot.pt2 and decode_aot.pt2.

    Args:
        context: the most tokens of a row.
        aot: compile with AOTInductor, for the device of the parameters; needs a C++ compiler.
    """
    limit = model.CONTEXT_LIMIT * model.config_of(params).sequence_len
    if not 2 <= context <= limit:
        raise UserError(f"context={context}: expected 2 … {limit}, the limit of the model")
    programs = export(params, context)
    for name, program in programs.items():
        torch.export.save(program, folder / f"{name}.pt2")
        if aot:
            path = str(folder / f"{name}_aot.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=path)
    config = model.config_of(params)
    shape = {"context": context, "vocab_size": config.vocab_size}
    jsonl.write_atomic(folder / "config.json", json.dumps(shape) + "\n")


def export(params: Params, context: int) -> dict[str, torch.export.ExportedProgram]:
    """Return {"prefill", "decode"} as programs whose batch, and for prefill length, is dynamic."""
    batch, length = torch.export.Dim("batch", max=65536), torch.export.Dim("length", min=2, max=context)
    device = params["wte"].device
    tokens_BT = torch.zeros(2, min(context, 5), dtype=torch.int64, device=device)
    length_B = torch.full((2,), tokens_BT.shape[1], device=device)
    with torch.no_grad():
        prefill = Prefill(params, context)
        _, cache = prefill(tokens_BT, length_B)
        shapes = {"tokens_BT": {0: batch, 1: length}, "length_B": {0: batch}}
        programs = {"prefill": torch.export.export(prefill, (tokens_BT, length_B), dynamic_shapes=shapes)}
        token_B = tokens_BT[:, 0].contiguous()  # AOTInductor keeps the strides of the example
        rows = tree.nest({name: {0: batch} for name in tree.flatten(cache)})
        shapes = {"tokens_B": {0: batch}, "cache": rows}
        programs["decode"] = torch.export.export(Decode(params), (token_B, cache), dynamic_shapes=shapes)
    return programs


class _Model(nn.Module):
    """Parameters as buffers, which is what torch.export puts into a program."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.config, self.names = model.config_of(params), list(tree.flatten(params))
        for name, value in tree.flatten(params).items():
            self.register_buffer(name.replace(".", "__"), value.detach())

    def params(self) -> dict[str, Any]:
        return tree.nest({name: getattr(self, name.replace(".", "__")) for name in self.names})


class Prefill(_Model):
    def __init__(self, params: Params, context: int) -> None:
        super().__init__(params)
        self.context = context

    def forward(self, tokens_BT: Tensor, length_B: Tensor) -> tuple[Tensor, dict[str, Any]]:
        params, rows, device = self.params(), tokens_BT.shape[0], tokens_BT.device
        cache = kv_cache.empty(self.config, rows, self.context, dtype=params["wte"].dtype, device=device)
        x_BTC, cache = model.decode_features(params, tokens_BT, cache, config=self.config, added_B=length_B)
        last_BC = x_BTC[torch.arange(rows, device=device), length_B - 1]
        return model.unembed(last_BC, params["lm_head"], self.config), cache


class Decode(_Model):
    def forward(self, tokens_B: Tensor, cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        params = self.params()
        x_B1C, cache = model.decode_features(params, tokens_B[:, None], cache, config=self.config)
        return model.unembed(x_B1C[:, 0], params["lm_head"], self.config), cache
