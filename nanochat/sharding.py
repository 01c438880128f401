"""Where the parameters and the optimizer's state lie: one rule table, four modes, and the few collectives they need."""

from collections.abc import Mapping, Sequence

# Logical axis -> mesh axis, in order of preference: the first axis of a parameter that has a rule and divides is cut.
# Axes without a rule (layers, gates, single numbers) belong to parameters too small to be worth a collective.
RULES = {"vocab": "shard", "hidden": "shard", "heads": "shard", "kv_heads": "shard", "embed": "shard"}


def shard_dim(shape: Sequence[int], axes: Sequence[str], ranks: int, rules: Mapping[str, str] = RULES) -> int | None:
    """Return the dimension of a parameter that is cut into `ranks` even parts, or None: every rank holds it whole.

    Args:
        shape: sizes. axes: logical name of each, as in `model.ParamSpec`. ranks: of the mesh's shard axis.
    """
    if any(axis not in rules for axis in axes) or ranks == 1:
        return None
    return next((d for d, size in enumerate(shape) if size % ranks == 0), None)
