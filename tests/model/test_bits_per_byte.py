"""Bits per byte against a plain loop over the tokens."""

import math

import pytest
import torch
from small_model import CONFIG, random_batch, random_params
from tensordict import TensorDict
from torch import Tensor

from nanochat import model
from nanochat.model import loss


def token_bytes() -> Tensor:
    """Return made-up lengths: every seventh id is special, the others stand for 1 … 5 bytes."""
    ids = torch.arange(CONFIG.vocab_size)
    return torch.where(ids % 7 == 0, 0, ids % 5 + 1)


def loss_fn(chunk_tokens: int | None):
    def f(params: TensorDict, batch) -> tuple[Tensor, dict[str, Tensor]]:
        return loss.next_token(params, batch, config=CONFIG, chunk_tokens=chunk_tokens)

    return f


BATCHES = [random_batch(seed=s, rows=s + 1) for s in range(3)]  # of different sizes


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_bits_per_byte_equals_a_loop(chunk_tokens: int | None):
    params, sizes = random_params(), token_bytes()
    nats, n_bytes, left_out = 0.0, 0, 0
    for batch in BATCHES:
        logs = model.apply(params, batch["inputs"], config=CONFIG).log_softmax(-1)
        for row, targets in zip(logs, batch["targets"]):
            for log_V, target in zip(row, targets.tolist()):
                if target < 0 or sizes[target] == 0:
                    left_out += 1
                    continue
                nats -= log_V[target].item()
                n_bytes += int(sizes[target])
    assert left_out > 9, "both ignored and special targets are among them"
    got = loss.bits_per_byte(params, BATCHES, sizes, loss_fn(chunk_tokens))
    assert math.isclose(got, nats / math.log(2) / n_bytes, rel_tol=1e-5)


def test_special_tokens_are_skipped():
    params, sizes = random_params(), token_bytes()
    batch = random_batch()
    special = (sizes[batch["targets"].clamp_min(0)] == 0) | (batch["targets"] < 0)
    dropped = {**batch, "targets": torch.where(special, -1, batch["targets"])}
    a, b = (loss.bits_per_byte(params, [x], sizes, loss_fn(None)) for x in (batch, dropped))
    assert a == b


def test_uniform_byte_model_has_eight_bits_per_byte():
    def uniform(_params: TensorDict, batch) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(math.log(256)), {"targets": (batch["targets"] >= 0).sum()}

    got = loss.bits_per_byte(random_params(), BATCHES, torch.ones(CONFIG.vocab_size, dtype=torch.long), uniform)
    assert math.isclose(got, 8.0, rel_tol=1e-6)


def test_batch_without_text_is_skipped():
    params, sizes = random_params(), token_bytes()
    empty = {**BATCHES[0], "targets": torch.full_like(BATCHES[0]["targets"], -1)}
    with_empty = loss.bits_per_byte(params, [*BATCHES, empty], sizes, loss_fn(None))
    assert with_empty == loss.bits_per_byte(params, BATCHES, sizes, loss_fn(None))
    with pytest.raises(ValueError, match="no target is text"):
        loss.bits_per_byte(params, [empty], sizes, loss_fn(None))


def test_bits_per_byte_computes_no_gradient():
    def watched(params: TensorDict, batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert not torch.is_grad_enabled()
        return loss_fn(None)(params, batch)

    loss.bits_per_byte(random_params(), BATCHES[:1], token_bytes(), watched)
    assert torch.is_grad_enabled()
