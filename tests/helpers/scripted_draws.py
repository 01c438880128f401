"""Lets the real engine draw what a test says, whatever the model computes."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
from torch import Tensor

from nanochat import infer
from nanochat.infer import engine, sampling

Script = Callable[[infer.Request], Sequence[int | None]]


def script_draws(patch: pytest.MonkeyPatch, script: Script) -> list[infer.Request]:
    """Let each request draw `script(request)`, tokens of tool results included; returns the requests as they come.

    Requests of the same time need different seeds. Where the script has None, and beyond it, a row draws as usual.
    """
    requests: list[infer.Request] = []
    tokens: dict[tuple[int, int], int] = {}  # (seed, position) -> what to draw
    admit, draw = engine.admit, sampling.draw

    def recorded(llm: infer.Engine, key: Hashable, request: infer.Request) -> None:
        requests.append(request)
        positions = range(len(request.prompt), llm.context)
        tokens.update({(request.seed, i): new for i, new in zip(positions, script(request)) if new is not None})
        admit(llm, key, request)

    def drawn(logits_BV: Tensor, *, seed_B: Tensor, position_B: Tensor, **settings: Any) -> Tensor:
        token_B = draw(logits_BV, seed_B=seed_B, position_B=position_B, **settings)
        for row, place in enumerate(zip(seed_B.tolist(), position_B.tolist())):
            token_B[row] = tokens.get(place, int(token_B[row]))
        return token_B

    patch.setattr(sampling, "draw", drawn)
    for module in (infer, engine):  # the page first: its name is looked up in the module when it is first used
        patch.setattr(module, "admit", recorded)
    return requests
