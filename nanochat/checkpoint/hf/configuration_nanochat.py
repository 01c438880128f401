"""Configuration of nanochat's GPT (July 2026) for transformers. Self-contained: `config.json` names this file."""

from typing import Any

from transformers import PretrainedConfig


class NanochatConfig(PretrainedConfig):
    """Shape of the model.

    Args:
        vocab_size: number of token ids; embedding tables have a multiple of 64 rows.
        max_position_embeddings: the training context in tokens.
        window_pattern: letters S (short window) and L (full context), tiled over the layers; the last layer is L.
    """

    # transformers has a `nanochat` of its own: the architecture of October 2025, which cannot read these weights.
    model_type = "nanochat_gpt"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        max_position_embeddings: int = 2048,
        window_pattern: str = "SSSL",
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = 4 * hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.window_pattern = window_pattern
        self.use_cache = use_cache
        # What transformers' cache needs: a query of a sliding layer sees `sliding_window` keys, itself included.
        short = -(-max_position_embeddings // 4 // 128) * 128
        pattern = [window_pattern.upper()[i % len(window_pattern)] for i in range(num_hidden_layers - 1)] + ["L"]
        self.layer_types = ["sliding_attention" if letter == "S" else "full_attention" for letter in pattern]
        self.sliding_window = short + 1 if "S" in pattern else None
        for name in ("intermediate_size", "head_dim", "layer_types", "sliding_window"):
            kwargs.pop(name, None)  # derived
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def windows(self) -> list[int]:
        """How far back each layer sees, in tokens: query i sees keys i - window … i."""
        full, short = self.max_position_embeddings, (self.sliding_window or 0) - 1
        return [short if kind == "sliding_attention" else full for kind in self.layer_types]
