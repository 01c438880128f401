"""What a device computes with: no float64, which Metal lacks, and only the dtypes that were asked for."""

import functools
from typing import Any

import pytest
import small_engine
import torch
from small_model import CONFIG, random_batch, random_params
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import infer, model, optim, train, tree
from nanochat.infer import Request
from nanochat.model import Compute, loss


class Dtypes(TorchDispatchMode):
    """Within, records {dtype: first operation that returned it} of all tensors of floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree.leaves(out):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.seen.setdefault(x.dtype, str(func))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_has_the_compute_dtype_and_float32(dtype: torch.dtype) -> None:
    state = train.init(random_params(dtype=dtype), model.spec(CONFIG), dtype)
    hparams = optim.as_hparams(optim.param_group_settings(optim.OptimConfig(), CONFIG.n_embd))
    loss_fn = functools.partial(loss.next_token, config=CONFIG, compute=Compute(dtype), chunk_tokens=16)
    update = train.make_update(compute_dtype=dtype, donate=True)
    step = functools.partial(train.train_step, value_and_grad=train.gradient(loss_fn), update=update)
    with Dtypes() as dtypes:
        _, metrics = step(state, [random_batch(seed=0), random_batch(seed=1)], hparams)
    assert metrics["finite"]
    assert set(dtypes.seen) == {dtype, torch.float32}, dtypes.seen


def test_float16_halves_its_loss_scale_until_gradients_are_finite() -> None:
    state = train.init(random_params(dtype=torch.float16), model.spec(CONFIG), torch.float16)
    state.scaler["scale"].fill_(2.0**24)
    hparams = optim.as_hparams(optim.param_group_settings(optim.OptimConfig(), CONFIG.n_embd))
    loss_fn = functools.partial(loss.next_token, config=CONFIG, compute=Compute(torch.float16))
    update = train.make_update(compute_dtype=torch.float16)
    step = functools.partial(train.train_step, value_and_grad=train.gradient(loss_fn), update=update)
    finite = []
    for seed in range(30):
        state, metrics = step(state, [random_batch(seed=seed)], hparams)
        finite.append(bool(metrics["finite"]))
    assert not finite[0] and finite.count(False) < 12 and finite[-1]
    assert float(state.scaler["scale"]) == 2.0 ** (24 - finite.count(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_has_the_compute_dtype_and_float32(dtype: torch.dtype) -> None:
    requests = [
        Request(small_engine.prompt(9), max_tokens=4, temperature=0.0),
        Request(small_engine.prompt(40), max_tokens=4, top_k=0, seed=1),
        Request(small_engine.prompt(3), max_tokens=4, top_p=0.9, frequency_penalty=0.5, logprobs=3, seed=2),
    ]
    with Dtypes() as dtypes:
        engine = small_engine.start(dtype=dtype)
        done = list(infer.complete(engine, requests))
    assert all(completion.tokens for completion in done)
    assert set(dtypes.seen) == {dtype, torch.float32}, dtypes.seen
