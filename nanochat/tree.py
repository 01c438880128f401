"""Helpers over trees of tensors: nested TensorDicts, dicts, tuples and NamedTuples alike.

TensorDict arithmetic with a 0-d tensor does not compile and mixes batch-size rules in; mapping a plain function
over the leaves does neither.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `f` to the corresponding leaves of trees of one structure; returns a tree of that structure."""
    return pytree.tree_map(f, tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in a fixed order."""
    return pytree.tree_leaves(tree)


def flatten(tree: Mapping[str, Any] | TensorDictBase, prefix: str = "") -> dict[str, Tensor]:
    """Return {"a.b.c": leaf} for a nest of TensorDicts or dicts, in the order of insertion."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, TensorDictBase | Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = cast(Tensor, value)
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> TensorDict:
    """Return the nested TensorDict (empty batch size) whose `flatten` is `flat`."""
    return TensorDict(nest(flat), batch_size=[])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"a": {"b": {"c": leaf}}} for {"a.b.c": leaf}."""
    whole: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = whole
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return whole


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Move every leaf to `device`."""
    return map(lambda x: x.to(device), tree)


def nbytes(tree: Tree) -> int:
    """Return the bytes that the leaves of `tree` hold."""
    return sum(x.numel() * x.element_size() for x in leaves(tree))
