"""Matrix products of the model, one signature for every precision: `Linear = (x, weight) -> y`.

Weights are (out, in) masters in float32; a `Linear` decides the precision of the product. Swapping the argument
swaps the precision, so a model trained in one is evaluated in another without touching a module.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in the dtype of `x`.

    Args:
        x: (..., in), any floating dtype.
        weight: (out, in), cast to the dtype of `x`.

    Returns:
        (..., out), dtype of `x`.
    """
    return F.linear(x, weight.to(x.dtype))
