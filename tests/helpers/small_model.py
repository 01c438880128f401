"""A small model for the tests, with random weights everywhere: the zeros of a fresh one hide half of the network."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import model, tree
from nanochat.model import ModelConfig, Params

CONFIG = ModelConfig(sequence_len=16, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
# The shortest short window is 128 tokens; more than that many tokens are needed to see it at work.
WINDOWED = ModelConfig(sequence_len=256, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)


def random_params(
    config: ModelConfig = CONFIG, seed: int = 0, dtype: torch.dtype = torch.float32, noise: float = 0.15
) -> Params:
    """Return parameters without a zero or a constant among them; the tables in `dtype`, as for `model.init`."""
    generator = torch.Generator().manual_seed(seed)
    initial = tree.flatten(model.init(config, seed))
    stored = {name: model.storage_dtype(row, dtype) for name, row in model.spec(config).items()}
    flat = {n: (x + noise * torch.randn(x.shape, generator=generator)).to(stored[n]) for n, x in initial.items()}
    return model.with_config(tree.unflatten(flat), config)


def random_batch(
    config: ModelConfig = CONFIG, rows: int = 2, n_time: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Return {"inputs", "targets"} of random ids, (rows, n_time), with three targets ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, (n_time or config.sequence_len) + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :3] = -1
    return {"inputs": ids[:, :-1], "targets": targets}


def assert_trees_close(got: Any, want: Any, *, rtol: float = 1e-5, atol: float = 0.0) -> None:
    """Fail, naming the leaf, where two trees differ by more than `atol` and `rtol` of the leaf's largest value."""
    got, want = tree.flatten(got), tree.flatten(want)
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        scale = value.abs().max().item()
        worst = (got[name] - value).abs().max().item()
        assert worst <= atol + rtol * scale, f"{name}: differs by {worst:.2e}, largest value {scale:.2e}"


class Unchanged:
    """A context in which the leaves of trees must keep values, versions, requires_grad and .grad."""

    def __init__(self, *trees: Any) -> None:
        self.leaves = tree.leaves(trees)

    def __enter__(self) -> None:
        self.before = [(x.detach().clone(), x._version, x.requires_grad, x.grad) for x in self.leaves]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert self.leaves, "nothing to watch"
            for x, (value, version, requires_grad, grad) in zip(self.leaves, self.before):
                assert torch.equal(x.detach(), value)
                assert (x._version, x.requires_grad) == (version, requires_grad)
                assert x.grad is grad


class LargestTensor(TorchDispatchMode):
    """Within, records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree.leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out
