"""Functions on trees of tensors: nested TensorDicts, dicts, tuples and NamedTuples alike.

Non-tensor data of a TensorDict, such as the model's configuration, is not a leaf: `map` keeps it, `leaves` and
`flatten` skip it. TensorDict arithmetic with a 0-d tensor does not compile, so functions are mapped over leaves.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `f` to the corresponding leaves of trees with one structure; the result has that structure."""
    return pytree.tree_map(f, tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in a fixed order."""
    return pytree.tree_leaves(tree)


def flatten(tree: Mapping[str, Any] | TensorDictBase, prefix: str = "") -> dict[str, Tensor]:
    """Return {"a.b.c": leaf} of nested TensorDicts or dicts, in insertion order."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, TensorDictBase | Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif not is_non_tensor(value):
            flat[f"{prefix}{key}"] = cast(Tensor, value)
    return flat


def unflatten(flat: Mapping[str, Tensor], like: TensorDictBase | None = None) -> TensorDict:
    """Return the nested TensorDict (empty batch size) whose `flatten` is `flat`, with the non-tensor data of `like`."""
    tree = TensorDict(nest(flat), batch_size=[])
    for key, value in like.items() if like is not None else ():
        if is_non_tensor(value):
            tree.set(key, value)
    return tree


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"a": {"b": {"c": leaf}}} for {"a.b.c": leaf}."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def to(tree: Tree, device: torch.device | str) -> Tree:
    return map(lambda x: x.to(device), tree)


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged in float64 (for finite differences)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nbytes(tree: Tree) -> int:
    return sum(x.numel() * x.element_size() for x in leaves(tree))
