"""Helpers over trees of tensors."""

from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree


class Point(NamedTuple):
    x: Tensor
    y: Tensor


def test_flatten_and_unflatten_are_inverse_and_keep_the_order():
    flat = {"b.2.w": torch.ones(2), "b.2.a": torch.zeros(3), "a": torch.ones(1), "b.10.w": torch.ones(4)}
    nest = tree.unflatten(flat)
    assert isinstance(nest, TensorDict) and isinstance(nest["b", "10"], TensorDict)
    assert nest.batch_size == torch.Size([])
    back = tree.flatten(nest)
    assert list(back) == ["b.2.w", "b.2.a", "b.10.w", "a"]  # by the first appearance of each branch
    assert all(back[name] is flat[name] for name in flat)


def test_flatten_accepts_dicts_and_a_prefix():
    x = torch.ones(1)
    assert list(tree.flatten({"a": {"b": x}, "c": TensorDict({"d": x}, [])}, "root.")) == ["root.a.b", "root.c.d"]
    assert tree.flatten({}) == {}


def test_map_keeps_the_structure_and_changes_nothing():
    point, table = Point(torch.ones(2), torch.zeros(2)), tree.unflatten({"a.b": torch.ones(3)})
    nest = {"p": point, "t": table, "l": [torch.ones(1)]}
    out = tree.map(lambda x, y: x + 2 * y, nest, nest)
    assert isinstance(out["p"], Point) and isinstance(out["t"], TensorDict)
    assert out["p"].x.tolist() == [3, 3] and out["t"]["a", "b"].tolist() == [3, 3, 3] and out["l"][0].item() == 3
    assert nest["p"].x.tolist() == [1, 1]


def test_nbytes_and_to():
    nest = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": tree.unflatten({"c": torch.zeros(2, dtype=torch.int64)})}
    assert tree.nbytes(nest) == 6 + 16
    assert all(x.is_meta for x in tree.leaves(tree.to(nest, "meta")))
    assert not nest["a"].is_meta
