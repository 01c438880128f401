"""Bits per byte against a plain loop over the tokens."""

import math

import pytest
import torch
from small_model import random_batch, random_params
from tensordict import TensorDict
from torch import Tensor

from nanochat import eval as evals
from nanochat import model
from nanochat.config import UserError
from nanochat.data import Tokenizer
from nanochat.model import ModelConfig, loss

TOK = Tokenizer((*(bytes([i]) for i in range(256)), b" the", b"ab", b"cde"))  # and nine special tokens of no bytes
CONFIG = ModelConfig(sequence_len=64, vocab_size=TOK.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
PARAMS = random_params(CONFIG)
BATCHES = [random_batch(CONFIG, seed=s, rows=s + 1) for s in range(3)]  # of different sizes


def loss_fn(params: TensorDict, batch: evals.bpb.Batch) -> tuple[Tensor, dict[str, Tensor]]:
    assert not torch.is_grad_enabled()
    return loss.next_token(params, batch, config=CONFIG, chunk_tokens=7)


def test_bits_per_byte_equals_a_loop():
    nats, n_bytes, skipped = 0.0, 0, 0
    for batch in BATCHES:
        logs = model.apply(PARAMS, batch["inputs"], config=CONFIG).log_softmax(-1)
        for row, targets in zip(logs, batch["targets"]):
            for log_V, target in zip(row, targets.tolist()):
                if target < 0 or target >= len(TOK.tokens):
                    skipped += 1
                    continue
                nats -= log_V[target].item()
                n_bytes += len(TOK.tokens[target])
    assert skipped > 9, "both ignored and special targets are among them"
    want = nats / math.log(2) / n_bytes
    assert evals.bits_per_byte(PARAMS, BATCHES, TOK, loss_fn) == pytest.approx(want, rel=1e-5)
    by_batch = list(evals.bpb.nats_by_row(PARAMS, BATCHES, TOK, CONFIG, model.Compute()))
    assert [len(rows) for rows in by_batch] == [1, 2, 3]
    row_nats, row_bytes = map(sum, zip(*(row for rows in by_batch for row in rows)))
    assert row_nats == pytest.approx(nats, rel=1e-5) and row_bytes == n_bytes


def test_batch_without_text_is_skipped():
    empty = {**BATCHES[0], "targets": torch.full_like(BATCHES[0]["targets"], -1)}
    with_empty = evals.bits_per_byte(PARAMS, [*BATCHES, empty], TOK, loss_fn)
    assert with_empty == evals.bits_per_byte(PARAMS, BATCHES, TOK, loss_fn)
    with pytest.raises(UserError, match="no target is text"):
        evals.bits_per_byte(PARAMS, [empty], TOK, loss_fn)
