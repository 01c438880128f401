"""Low-rank adapters: the merged model, its gradient, and steps that are the same in every mode of sharding."""

import dataclasses

import lora_ranks
import pytest
import ranks
import torch
from small_model import CONFIG, assert_trees_close, random_batch, random_params
from torch import Tensor

from nanochat import model, train, transform, tree
from nanochat.config import UserError
from nanochat.model import Compute, lora, loss

ALL = ["layers.*.attn.[qkv]", "layers.*.attn.proj", "layers.*.mlp.*", "lm_head"]


@pytest.mark.parametrize("rank", [0, 3])
def test_new_adapters_leave_the_base_as_it_is(rank: int):
    base, batch = random_params(), random_batch()
    merged = lora.merge(base, lora.init(CONFIG, 0, rank, ALL))
    assert_trees_close(merged, base, rtol=0)
    assert torch.equal(loss.next_token(merged, batch)[0], loss.next_token(base, batch)[0])
    assert model.config_of(merged) == CONFIG


def test_gradient_is_that_of_the_merged_matrices_by_the_chain_rule():
    base, batch, adapters = random_params(), random_batch(), lora_ranks.random_adapters(CONFIG, ALL)
    merged, scale = lora.merge(base, adapters), adapters[lora.SCALE_KEY]
    assert scale == 16 / 3

    def of_adapters(adapters: model.Params) -> Tensor:
        return loss.next_token(lora.merge(base, adapters), batch)[0]

    grads, value = transform.value_and_grad(of_adapters)(adapters)
    outer, want = transform.value_and_grad(lambda params: loss.next_token(params, batch)[0])(merged)
    torch.testing.assert_close(value, want, rtol=1e-6, atol=0)
    outer, flat, expected = tree.flatten(outer), tree.flatten(adapters), {}
    for name in flat:
        target, _, part = name.rpartition(".")
        a, b = flat[f"{target}.a"], flat[f"{target}.b"]
        expected[name] = scale * (b.T @ outer[target] if part == "a" else outer[target] @ a.T)
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-8)
    assert_trees_close(torch.func.grad(of_adapters)(adapters), expected, rtol=1e-4, atol=1e-8)
    assert not any(x.requires_grad for x in tree.leaves(base)), "the base is a constant"


def test_merged_logits_equal_those_of_two_thin_products_beside_each_matrix():
    base, adapters = random_params(), lora_ranks.random_adapters(CONFIG, ALL)
    flat, scale = tree.flatten(adapters), adapters[lora.SCALE_KEY]
    thin = {id(x): (flat[f"{n}.a"], flat[f"{n}.b"]) for n, x in tree.flatten(base).items() if f"{n}.a" in flat}
    assert len(thin) == 6 * CONFIG.n_layer + 1

    def unmerged(x: Tensor, weight: Tensor) -> Tensor:
        a, b = thin.get(id(weight), (torch.zeros(1, x.shape[-1]), torch.zeros(len(weight), 1)))
        return x @ weight.T + scale * (x @ a.T) @ b.T

    tokens = random_batch()["inputs"]
    got = model.apply(lora.merge(base, adapters), tokens)
    want = model.apply(base, tokens, compute=Compute(linear=unmerged))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (got - model.apply(base, tokens)).abs().max() > 0.1


def test_targets_are_matrices_by_name_or_pattern():
    rows = lora.spec(CONFIG, 4, ["layers.1.attn.q", "layers.*.mlp.fc"])
    assert [n for n in rows if n.endswith(".b")] == ["layers.0.mlp.fc.b", "layers.1.attn.q.b", "layers.1.mlp.fc.b",
                                                     "layers.2.mlp.fc.b"]  # fmt: skip
    assert rows["layers.1.mlp.fc.a"].shape == (4, 32) and rows["layers.1.mlp.fc.b"].shape == (128, 4)
    for pattern in ("layers.*.atn.q", "wte", "layers.*.attn.value_embed"):
        with pytest.raises(UserError, match=r"lora.targets=.*: no matrix has such a name"):
            lora.spec(CONFIG, 4, [pattern])


@pytest.mark.slow
def test_compiled_gradient_equals_the_eager_one():
    config = dataclasses.replace(CONFIG, n_layer=1)
    adapters, batch = lora_ranks.random_adapters(config, ALL), random_batch(config)
    of_adapters = train.build.Lora(random_params(config), {}, {}).adapted(
        lambda p, b: loss.next_token(p, b, config=config), None
    )
    compiled = torch.compile(of_adapters, fullgraph=True, backend="aot_eager")
    (got, _), (want, _) = (transform.value_and_grad(f, has_aux=True)(adapters, batch) for f in (compiled, of_adapters))
    assert_trees_close(got, want, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_in_every_mode():
    rows = ranks.call(2, lora_ranks.modes)[0]
    for row in rows:
        assert row["losses"] < 1e-5 and row["params"] < 1e-4, row
        assert row["sharded"] == (row["mode"] != "replicate"), row
    assert {row["mode"]: row["half"] for row in rows} == {"replicate": False, "zero2": True, "fsdp": True,
                                                         "fsdp, gathered once a step": True}  # fmt: skip
