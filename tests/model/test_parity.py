"""Numbers of the reference implementation, float32 on CPU, held against ours; see tests/golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat import model, optim, transform, tree
from nanochat.checkpoint import convert
from nanochat.model import loss

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "reference_d4.npz", allow_pickle=False)
CONFIG = model.ModelConfig(sequence_len=32, vocab_size=100, n_layer=4, n_head=2, n_kv_head=1, n_embd=32)


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def golden_params(prefix: str) -> model.Params:
    names = [n for n in GOLDEN.files if n.startswith(prefix)]
    return convert.from_reference({n.removeprefix(prefix): golden(n) for n in names}, CONFIG)


def assert_close(got: model.Params, want: model.Params) -> None:
    flat = tree.flatten(want)
    for name, value in tree.flatten(got).items():
        worst = (value - flat[name]).abs().max() / flat[name].abs().max()
        assert worst < 1e-4, f"{name}: relative difference {worst:.1e}"


def batch(i: int) -> dict[str, Tensor]:
    return {"inputs": golden("tokens")[i, :, :-1], "targets": golden("tokens")[i, :, 1:].contiguous()}


FIRST = {"inputs": golden("tokens")[0, :, :-1], "targets": golden("targets0")}


def test_config_matches_the_golden_file():
    assert GOLDEN["config"].tolist() == [4, 2, 1, 32, 32, 100]
    assert str(GOLDEN["window_pattern"]) == CONFIG.window_pattern
    assert tuple(GOLDEN["window_sizes"]) == CONFIG.windows


def test_logits():
    logits = model.apply(golden_params("param/"), FIRST["inputs"], config=CONFIG)
    assert (logits - golden("logits")).abs().max() < 1e-4


@pytest.mark.parametrize("chunk_tokens", [None, 20])
def test_losses_and_every_gradient(chunk_tokens: int | None):
    params, options = golden_params("param/"), {"config": CONFIG, "chunk_tokens": chunk_tokens}
    grads, (mean, aux) = transform.value_and_grad(loss.next_token, has_aux=True)(params, FIRST, **options)
    assert aux["targets"] == 58
    torch.testing.assert_close(mean, golden("loss"), rtol=1e-4, atol=0)
    assert_close(grads, golden_params("grad/"))
    each = loss.per_token(params, FIRST, config=CONFIG, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(each.flatten(), golden("loss_none"), rtol=1e-4, atol=1e-6)


def test_three_steps():
    params = golden_params("param/")
    opt_state = optim.init(params, model.spec(CONFIG))
    rates = optim.param_group_settings(optim.OptimConfig(), CONFIG.n_embd)
    for i in range(3):
        value_and_grad = transform.value_and_grad(lambda p: loss.next_token(p, batch(i), config=CONFIG)[0])  # noqa: B023
        grads, value = value_and_grad(params)
        assert abs(value.item() / GOLDEN["step_losses"][i] - 1) < 1e-4
        scheduled = {group: row | {"lr": row["lr"] * GOLDEN["sched/lrm"][i]} for group, row in rates.items()}
        scheduled["matrix"] |= {"momentum": GOLDEN["sched/momentum"][i], "weight_decay": GOLDEN["sched/wd"][i]}
        params, opt_state = optim.update(grads, opt_state, params, optim.as_hparams(scheduled))
    assert_close(params, golden_params("after/"))


def test_apply_equals_the_reference_decode_logits():
    params, ids = golden_params("after/"), golden("decode_ids")
    logits = model.apply(params, ids, config=CONFIG)[0]
    assert (logits[4:] - golden("decode_logits")).abs().max() < 1e-4


def test_greedy_tokens():
    params, ids = golden_params("after/"), golden("decode_ids")
    for _ in range(16):  # beyond sequence_len: the windows slide, the rotation is extrapolated
        best = model.apply(params, ids, config=CONFIG)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert ids[0, -16:].tolist() == GOLDEN["greedy"].tolist()


def test_flops():
    assert model.flops_per_token(CONFIG) == float(GOLDEN["flops_per_token"])
