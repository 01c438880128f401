"""The model: one table of parameters, and pure functions of them.

params = model.init(model.ModelConfig(n_layer=4), seed=0)
logits_BTV = model.apply(params, tokens_BT)
"""

from typing import TYPE_CHECKING

from nanochat.lazy import lazy_exports

if TYPE_CHECKING:
    from nanochat.model import attention, gpt, kv_cache, linear, lora, loss, params
    from nanochat.model.attention import Attend
    from nanochat.model.gpt import (
        CONTEXT_LIMIT,
        Compute,
        PackedPositions,
        apply,
        decode,
        decode_features,
        features,
        fuse_qkv,
        get_param,
        unembed,
    )
    from nanochat.model.linear import Linear, dense, fp8, fp8_emulated
    from nanochat.model.loss import IGNORE
    from nanochat.model.params import (
        ModelConfig,
        Params,
        ParamsLike,
        ParamSpec,
        config_of,
        count,
        decode_bytes,
        decode_flops,
        flops_per_token,
        from_depth,
        init,
        spec,
        storage_dtype,
        with_config,
    )

__getattr__ = lazy_exports(__name__, __file__)
