"""nanochat's GPT (July 2026) for transformers. Self-contained: it needs this file, the configuration and torch.

Pre-norm transformer with relu² MLPs, rotary embedding, and without biases or norm weights. What is its own:

- smear: each token's embedding gets a gated fraction of the previous token's.
- x0: each layer starts from resid_lambda · x + x0_lambda · (the smeared embedding).
- value embeddings: in every second layer, each token adds a gated embedding of itself to its values.
- QK norm: queries and keys are normalized after the rotation, and scaled by 1.2.
- windows: a query sees so many tokens back, in full layers too, where it is the training context.
- backout: a fraction of the residual stream in the middle is subtracted at the end.
- logits are softly capped at ±15.

Letters in names: B batch, T new tokens, S all tokens, C width, N query heads, K key/value heads, H head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_nanochat import NanochatConfig

ROTARY_BASE = 100_000.0
QK_SCALE = 1.2
LOGIT_CAP = 15.0
SMEAR_WIDTH = 24  # leading channels that gate the smear
VALUE_GATE_WIDTH = 12  # leading channels that gate the value embeddings
# How this version of transformers calls the cache.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotation(position_ids_BT: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each (B, T, 1, H/2)."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids_BT.device, dtype=torch.float32) / head_dim
    angle = position_ids_BT.float()[..., None, None] * ROTARY_BASE**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x_BTNH.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def eager_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, which also returns the weights (B, N, T, S)."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * scaling
    if attention_mask is None:  # plainly causal
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2), weights


class NanochatAttention(nn.Module):
    is_causal = True

    def __init__(self, config: NanochatConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.window = config.head_dim, config.windows[layer_idx]
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        n, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, n, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, k, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, k, bias=False)
        self.o_proj = nn.Linear(n, config.hidden_size, bias=False)
        self.has_value_embed = layer_idx % 2 == (config.num_hidden_layers - 1) % 2
        if self.has_value_embed:
            self.value_embed = nn.Embedding(padded(config.vocab_size), k)
            self.value_gate = nn.Linear(VALUE_GATE_WIDTH, config.num_key_value_heads, bias=False)

    def forward(
        self,
        x_BTC: Tensor,
        input_ids: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: DynamicCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (p(x_BTC).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_value_embed:
            embed_BTKH = self.value_embed(input_ids).to(x_BTC.dtype).unflatten(-1, (-1, self.head_dim))
            gate_BTK = 3 * torch.sigmoid(self.value_gate(x_BTC[..., :VALUE_GATE_WIDTH]))
            v = v + gate_BTK[..., None] * embed_BTKH
        q, k = (QK_SCALE * rms(rotate(x, *rotary)) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if attention_mask is not None:  # a sliding layer's cache returns the last keys only
            attention_mask = attention_mask[..., -k.shape[2] :]
        implementation = self.config._attn_implementation
        attend = eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        scaling, window = self.head_dim**-0.5, self.window + 1
        out, weights = attend(self, q, k, v, attention_mask, scaling=scaling, dropout=0.0, sliding_window=window)
        return self.o_proj(out.flatten(2)), weights


class NanochatMLP(nn.Module):
    def __init__(self, config: NanochatConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NanochatLayer(GradientCheckpointingLayer):
    def __init__(self, config: NanochatConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = NanochatAttention(config, layer_idx)
        self.mlp = NanochatMLP(config)

    def forward(
        self, x: Tensor, first: Tensor, resid_lambda: Tensor, x0_lambda: Tensor, **inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        x = resid_lambda * x + x0_lambda * first
        attended, weights = self.self_attn(rms(x), **inputs)
        x = x + attended
        return x + self.mlp(rms(x)), weights


class NanochatPreTrainedModel(PreTrainedModel):
    config_class = NanochatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanochatLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Vectors are float32 in training too, where matrices are multiplied in half precision.
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for a phrase of its own models in this file


class NanochatModel(NanochatPreTrainedModel):
    def __init__(self, config: NanochatConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(padded(config.vocab_size), config.hidden_size)
        self.smear_gate = nn.Linear(SMEAR_WIDTH, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        self.layers = nn.ModuleList([NanochatLayer(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Return final activations (B, T, C).

        Args:
            input_ids: (B, T) new tokens, after those in the cache.
            attention_mask: (B, S) of cached and new tokens, 0 for padding, on the left or on the right.
            position_ids: (B, T); by default counted from each row's first token that is not padding.
            cache: a DynamicCache (`past_key_values` in older versions of transformers).
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("pass input_ids: value embeddings are looked up by token, so inputs_embeds do not suffice")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions: expected (batch, tokens)")
        n_new, total = input_ids.shape[1], past + input_ids.shape[1]
        if position_ids is None:
            is_token = (
                attention_mask if attention_mask is not None else torch.ones_like(input_ids[:1, :1]).expand(1, total)
            )
            position_ids = (is_token.long().cumsum(-1) - 1).clamp(min=0)[:, -n_new:]

        seen = input_ids
        if cache is not None:
            seen = remember_ids(cache, input_ids, self.config.num_hidden_layers)[:, -n_new - 1 :]
        embedded = rms(self.embed_tokens(seen))  # with the last token of the cache, if there is one
        gate = torch.sigmoid(self.smear_gate(embedded[:, 1:, :SMEAR_WIDTH]))
        smeared = embedded[:, 1:] + self.smear_lambda.to(embedded.dtype) * gate * embedded[:, :-1]
        embedded, smeared = embedded[:, -n_new:], torch.cat([embedded[:, :1], smeared], dim=1)[:, -n_new:]
        x = first = torch.where((position_ids > 0)[..., None], smeared, embedded)

        rotary = rotation(position_ids, self.config.head_dim, x.dtype)
        masks = {window: self.mask(attention_mask, n_new, total, window) for window in set(self.config.windows)}
        hidden_states, attentions, middle = [x], [], x
        for i, layer in enumerate(self.layers):
            x, weights = layer(
                x, first, self.resid_lambdas[i], self.x0_lambdas[i], input_ids=input_ids, rotary=rotary,
                attention_mask=masks[self.config.windows[i]], cache=cache,
            )  # fmt: skip
            if i == self.config.num_hidden_layers // 2:
                middle = x
            hidden_states.append(x)
            attentions.append(weights)
        x = rms(x - self.backout_lambda.to(x.dtype) * middle)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: cache},
        )

    def mask(self, attention_mask: Tensor | None, n_new: int, total: int, window: int) -> Tensor | None:
        """Return which of all keys each new token sees, (B or 1, 1, T, S); None: all before it and itself.

        FlashAttention takes windows as they are, so its mask is that of the padding, (B, S).
        """
        padded_mask = attention_mask if attention_mask is not None and not attention_mask.all() else None
        if "flash" in str(self.config._attn_implementation):
            return padded_mask
        if padded_mask is None and total <= window + 1 and n_new in (1, total):
            return None
        key = torch.arange(total, device=self.smear_lambda.device)
        query = key[-n_new:, None]
        visible = ((key <= query) & (key >= query - window))[None, None]
        if padded_mask is not None:  # padding sees itself: a row without any key would be NaN
            visible = (visible & padded_mask[:, None, None].bool()) | (key == query)
        return visible


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    def __init__(self, config: NanochatConfig) -> None:
        super().__init__(config)
        self.model = NanochatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, padded(config.vocab_size), bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits (B, T, V) in float32, within ±15, and with `labels` (B, T) the loss."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, past_key_values, inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions, return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])[..., : self.config.vocab_size].float()
        logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest = {name: outputs[name] for name in (CACHE, "hidden_states", "attentions") if name in outputs}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)


def padded(vocab_size: int) -> int:
    """Return the number of embedding rows."""
    return -(-vocab_size // 64) * 64


def remember_ids(cache: DynamicCache, input_ids: Tensor, n_layer: int) -> Tensor:
    """Return all ids (B, S) that a cache has seen, `input_ids` included: the smear needs the last one's embedding.

    They are one more layer of the cache, so that beam search reorders them and rejected drafts are cropped.
    """
    if getattr(cache, "is_compileable", False):
        raise ValueError("static caches are not supported: use a DynamicCache, the default")
    if len(cache.layers) == n_layer:
        cache.layers.append(DynamicLayer())
    ids_B1S1 = input_ids[:, None, :, None]
    return cache.update(ids_B1S1, ids_B1S1, n_layer)[0][:, 0, :, 0]
