"""The model: its table of parameters, causality, windows, purity, numbers of parameters and FLOPs, and refusals."""

import dataclasses
import math

import pytest
import torch
from small_model import CONFIG, WINDOWED, Unchanged, random_batch, random_params
from torch import Tensor

from nanochat import model, optim, transform, tree
from nanochat.model import Compute, ModelConfig, Params, attention, gpt, kv_cache, linear, loss

# --- the table ------------------------------------------------------------------------------------------------------

# Mean and standard deviation, or the values; C = 128. Shapes and groups are those of the golden values.
C_STD = 128**-0.5
INITIAL = {
    "wte": (0.0, 0.8),
    "lm_head": (0.0, 0.001),
    "smear_gate": (0.01, 0.02 / 12**0.5),
    "layers.3.attn.value_gate": (0.01, 0.02 / 12**0.5),
    "layers.3.mlp.fc": (0.0, 0.4 * C_STD),
    **{f"layers.3.attn.{name}": (0.0, C_STD) for name in ("q", "k", "v", "value_embed")},
    **{name: [0.0] for name in ("layers.3.attn.proj", "layers.3.mlp.proj", "smear_lambda")},
    "resid_lambdas": [1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05],
    "x0_lambdas": [0.20, 0.15, 0.10, 0.05],
    "backout_lambda": [0.2],
}


@pytest.mark.parametrize("name", INITIAL)
def test_initial_values(name: str):
    config = ModelConfig(sequence_len=64, vocab_size=1000, n_layer=4, n_head=4, n_kv_head=2, n_embd=128)
    values, expected = tree.flatten(model.init(config, 3))[name], INITIAL[name]
    if isinstance(expected, list):
        torch.testing.assert_close(values, torch.tensor(expected).expand_as(values))
    else:
        (mean, std), n = expected, values.numel()
        assert abs(values.mean() - mean) < 4 * std / math.sqrt(n) and abs(values.std() / std - 1) < 4 / math.sqrt(2 * n)


@pytest.mark.parametrize("n_layer, layers", [(1, [0]), (2, [1]), (4, [1, 3]), (5, [0, 2, 4])])
def test_value_embeddings_are_on_every_second_layer(n_layer: int, layers: list[int]):
    config = dataclasses.replace(CONFIG, n_layer=n_layer)
    assert [i for i in range(n_layer) if f"layers.{i}.attn.value_embed" in model.spec(config)] == layers


def test_embeddings_are_stored_in_the_compute_dtype():
    tables = {"wte", *(f"layers.{i}.attn.value_embed" for i in (0, 2))}
    for dtype, stored in [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]:
        for name, value in tree.flatten(model.init(CONFIG, 0, dtype=getattr(torch, dtype))).items():
            assert value.dtype == (getattr(torch, stored) if name in tables else torch.float32), (name, dtype)


def test_initial_values_depend_on_the_seed_and_the_name_alone():
    state = torch.manual_seed(2).get_state()
    first, other = (tree.flatten(model.init(CONFIG, seed)) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state), "init drew from the global generator"
    deeper = tree.flatten(model.init(dataclasses.replace(CONFIG, n_layer=5), 0))
    for name in ("wte", "lm_head", *(f"layers.{i}.attn.{m}" for i in range(3) for m in "qkv")):
        assert torch.equal(first[name], deeper[name]) and not torch.equal(first[name], other[name]), name
    assert not torch.equal(first["layers.0.attn.k"], first["layers.0.attn.v"])
    assert not torch.equal(first["layers.0.attn.q"], first["layers.1.attn.q"])


# --- forward --------------------------------------------------------------------------------------------------------


def test_causality_by_gradients():
    params = random_params()
    n_time = 9
    tokens = torch.randperm(CONFIG.vocab_size, generator=torch.Generator().manual_seed(0))[:n_time]
    tables = ["wte", "layers.0.attn.value_embed", "layers.2.attn.value_embed"]

    def at(position: int, params: Params) -> Tensor:
        return model.apply(params, tokens[None], config=CONFIG)[0, position].square().sum()

    for t in range(n_time):  # every token is another row of the tables, so a row stands for a position
        grads = tree.flatten(torch.func.grad(at, argnums=1)(t, params))
        for table in tables:
            reached = grads[table][tokens].abs().amax(-1) > 0
            assert reached.tolist() == [s <= t for s in range(n_time)], (t, table)


def test_a_window_hides_tokens():
    assert WINDOWED.windows == (128, 128, 256)
    params, tokens = random_params(WINDOWED), random_batch(WINDOWED, n_time=300)["inputs"]
    got, plain = (model.apply(params, tokens, compute=Compute(attend=f)) for f in (attention.sdpa, attention.math))
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-4)
    full = dataclasses.replace(WINDOWED, window_pattern="L")
    other = model.apply(model.with_config(params, full), tokens)
    torch.testing.assert_close(other[:, :129], got[:, :129], rtol=0, atol=1e-4)
    assert (other - got)[:, 129:].abs().max() > 1e-2


@pytest.mark.parametrize(
    "sequence_len, n_layer, pattern, windows",
    [
        (2048, 4, "SSSL", (512, 512, 512, 2048)),
        (2048, 6, "sl", (512, 2048, 512, 2048, 512, 2048)),
        (2048, 2, "S", (512, 2048)),  # the last layer is always full
        (1000, 3, "SLS", (256, 1000, 1000)),  # 250 rounded up to a multiple of 128
        (32, 2, "S", (128, 32)),
    ],
)
def test_windows(sequence_len: int, n_layer: int, pattern: str, windows: tuple[int, ...]):
    config = ModelConfig(sequence_len=sequence_len, n_layer=n_layer, window_pattern=pattern)
    assert config.windows == windows


def test_every_matrix_product_uses_compute_linear():
    seen = []

    def counting(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(tuple(weight.shape))
        return linear.dense(x, weight)

    compute = Compute(linear=counting)
    got = model.apply(random_params(), random_batch()["inputs"], config=CONFIG, compute=compute)
    assert sorted(seen) == sorted(row.shape for row in model.spec(CONFIG).values() if row.matmul)
    assert torch.equal(got, model.apply(random_params(), random_batch()["inputs"], config=CONFIG))


def test_half_precision_is_close_and_returns_float32_logits():
    tokens = random_batch()["inputs"]
    want = model.apply(random_params(), tokens, config=CONFIG)
    stored = model.apply(random_params(dtype=torch.bfloat16), tokens, config=CONFIG)
    requested = model.apply(random_params(), tokens, config=CONFIG, compute=Compute(dtype=torch.bfloat16))
    for got in (stored, requested):
        assert got.dtype == torch.float32
        assert 0 < (got - want).abs().mean() < 0.02 * want.abs().max()


def test_apply_and_gradients_change_no_argument():
    batch, f = random_batch(), lambda p: loss.next_token(p, batch)[0]
    for params in (random_params(), tree.map(lambda x: x.requires_grad_(), random_params())):
        with Unchanged(params, batch):
            model.apply(params, batch["inputs"])
            transform.value_and_grad(f)(params)
            torch.func.grad(f)(params)


# --- the config travels with the parameters -------------------------------------------------------------------------


def test_apply_needs_parameters_and_tokens_only():
    params, batch = random_params(WINDOWED), random_batch(WINDOWED, n_time=150)
    bare = tree.nest(tree.flatten(params))
    want = model.apply(bare, batch["inputs"], config=WINDOWED)
    assert torch.equal(model.apply(params, batch["inputs"]), want)
    assert torch.equal(loss.next_token(params, batch)[0], loss.next_token(bare, batch, config=WINDOWED)[0])
    assert torch.equal(loss.per_token(params, batch), loss.per_token(bare, batch, config=WINDOWED))
    cache = kv_cache.empty(WINDOWED, 2, 150)
    logits, _ = model.decode(params, batch["inputs"], cache)
    assert (logits - want).abs().max() < 1e-4


def test_config_survives_transforms_copies_and_optimizer_steps():
    params, batch = random_params(), random_batch()

    def value(params: Params) -> Tensor:
        return loss.next_token(params, batch)[0]

    grads = torch.func.grad(value)(params)
    members = torch.func.vmap(value)(tree.map(lambda x: torch.stack([x, 2 * x]), params))
    assert torch.allclose(members, torch.stack([value(params), value(tree.map(lambda x: 2 * x, params))]))
    copies = [grads, transform.value_and_grad(value)(params)[0], params.clone(), params.to(torch.float64)]
    copies.append(tree.unflatten(tree.flatten(params), like=params))
    state = optim.init(params, model.spec(CONFIG))
    values = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "momentum": 0.9, "weight_decay": 0.0}
    hparams = optim.as_hparams(dict.fromkeys({row.group for row in model.spec(CONFIG).values()}, values))
    copies.append(optim.update(grads, state, params, hparams)[0])
    optim.update_(grads, state, params, hparams)
    assert [model.config_of(copy) for copy in copies] == [CONFIG] * len(copies)


# --- counts ---------------------------------------------------------------------------------------------------------


# Scaling parameters, which tests/optim/test_scaling.py has by depth; 32768·C embeddings, and as many in L/2 value
# embeddings; 2·L + 26 scalars.
@pytest.mark.parametrize("depth, total", [(12, 286_261_730), (20, 896_533_746), (26, 1_681_786_938)])
def test_number_of_parameters(depth: int, total: int):
    assert model.count(model.from_depth(depth))["total"] == total


def test_flops():
    config, matmuls = model.from_depth(12), 6 * (110_100_912 + 24)
    assert model.flops_per_token(config) == matmuls + 12 * 768 * (9 * 512 + 3 * 2048)  # nine windows are short
    assert model.flops_per_token(config, 256) == matmuls + 12 * 768 * 12 * 256


@pytest.mark.parametrize("depth, n_head", [(1, 1), (3, 2), (13, 7), (20, 10)])
def test_width_is_rounded_up_to_a_multiple_of_head_dim(depth: int, n_head: int):
    config = model.from_depth(depth)
    assert (config.n_head, config.n_embd, config.head_dim) == (n_head, n_head * 128, 128)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layer": 0}, "model n_layer=0: must be at least 1"),
        ({"n_embd": 30}, "model n_embd=30: must be n_head=4 times an even head width"),
        ({"n_embd": 36}, "model n_embd=36: must be n_head=4 times an even head width"),  # heads of 9
        ({"n_kv_head": 3}, "model n_head=4: must be a multiple of n_kv_head=3"),
        ({"n_embd": 16}, "model n_embd=16: must be at least 24"),
        ({"window_pattern": "SXL"}, "model window_pattern='SXL': letters S and L only"),
        ({"window_pattern": ""}, "model window_pattern='': letters S and L only"),
    ],
)
def test_invalid_configs_are_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(CONFIG, **change)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layer": 4}, "parameters have n_layer 3, the config 4"),
        ({"n_embd": 64}, "parameters have n_embd 32, the config 64"),
        ({"vocab_size": 200}, "parameters have padded vocabulary 128, the config 256"),
        ({"n_kv_head": 4}, "parameters have n_kv_head 2, the config 4"),
        ({"n_head": 8, "n_kv_head": 2}, "parameters have n_kv_head x head_dim 16, the config 8"),
    ],
)
def test_params_of_another_shape_are_refused(change: dict[str, int], message: str):
    params = model.with_config(random_params(), dataclasses.replace(CONFIG, **change))
    with pytest.raises(ValueError, match=f"^{message}: pass the config they were made with$"):
        model.apply(params, random_batch()["inputs"])


def test_missing_or_contradicting_config_is_refused():
    tokens, other = random_batch()["inputs"], dataclasses.replace(CONFIG, window_pattern="L")
    with pytest.raises(ValueError, match="these parameters have no config attached: pass config="):
        model.apply(tree.nest(tree.flatten(random_params())), tokens)
    with pytest.raises(ValueError, match="config has window_pattern='L', the one attached to the parameters 'SSSL'"):
        model.apply(random_params(), tokens, config=other)


def test_sequence_over_the_limit_is_refused():
    params, n_time = random_params(), 10 * CONFIG.sequence_len
    assert model.apply(params, torch.zeros(1, n_time, dtype=torch.long), config=CONFIG).isfinite().all()
    with pytest.raises(ValueError, match="sequence of 161 tokens: over the limit of 10 x sequence_len=16"):
        model.apply(params, torch.zeros(1, n_time + 1, dtype=torch.long), config=CONFIG)


@pytest.mark.parametrize("bad", [128, -1])
def test_token_ids_out_of_range_and_without_batch_dimension_are_refused(bad: int):
    tokens = random_batch()["inputs"].clone()
    tokens[1, 4] = bad
    params = random_params()
    with pytest.raises(ValueError, match="token id out of range 0 … 127"):
        model.apply(params, tokens, config=CONFIG)
    with pytest.raises(ValueError, match="token id out of range"):
        torch.func.vmap(lambda t: model.apply(params, t[None], config=CONFIG))(tokens)
    with pytest.raises(ValueError, match=r"tokens of shape \(16,\): expected \(batch, time\)"):
        model.apply(params, tokens[0])


def test_one_compiled_apply_serves_models_of_different_shapes():
    apply = torch.compile(model.apply, fullgraph=True, backend="eager")
    for n_layer, pattern in ((2, "SL"), (3, "L")):
        shape = dataclasses.replace(CONFIG, n_layer=n_layer, window_pattern=pattern)
        params = random_params(shape)
        tokens = torch.randint(shape.vocab_size, (2, 16))
        assert torch.equal(apply(params, tokens), model.apply(params, tokens, config=shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_that_of_its_halves_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 3, 7, 4, 16, generator=generator).to(dtype)
    angle = torch.arange(7.0)[:, None, None] * gpt.ROTARY_BASE ** -(torch.arange(0, 16, 2) / 16)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def halves(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)

    def rotate(x: Tensor) -> Tensor:
        return gpt.rotate(x, gpt.rotation(torch.arange(7), 16, dtype))

    assert torch.equal(rotate(x), halves(x))
    got, want = (torch.func.vjp(f, x)[1](grad)[0] for f in (rotate, halves))
    assert torch.equal(got, want)
