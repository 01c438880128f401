"""The model: one table of parameters, and pure functions of them.

params = model.init(model.ModelConfig(n_layer=4), seed=0)
logits_BTV = model.apply(params, tokens_BT)
"""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.model import attention, gpt, kv_cache, linear, loss, params
    from nanochat.model.attention import Attend
    from nanochat.model.gpt import (
        CONTEXT_LIMIT,
        SMEAR_WIDTH,
        VALUE_GATE_WIDTH,
        Compute,
        ModelConfig,
        PackedPositions,
        Params,
        apply,
        config_of,
        count,
        decode,
        decode_bytes,
        decode_features,
        decode_flops,
        features,
        flops_per_token,
        from_depth,
        fuse_qkv,
        gathered,
        init,
        mlp,
        project_qkv,
        rms,
        rotate,
        rotation,
        smear,
        spec,
        storage_dtype,
        unembed,
        with_config,
    )
    from nanochat.model.linear import Linear, dense, fp8, fp8_emulated
    from nanochat.model.loss import IGNORE
    from nanochat.model.params import ParamsLike

__getattr__ = lazy_exports(__name__, __file__)
