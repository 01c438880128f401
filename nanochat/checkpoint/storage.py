"""Arrays on disk in orbax's layout, as NumPy arrays: what `checkpoint` needs of jax, orbax and tensorstore.

orbax creates, publishes and deletes steps on rank 0; every process writes its own blocks with tensorstore, orbax's
storage engine. Across processes orbax itself saves jax.Arrays only: that takes `jax.distributed`, whose service
terminates all ranks when one is lost, and for int64 `jax_enable_x64`, which changes the results of a program's own JAX.
"""

import dataclasses
import functools
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from nanochat import tree

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DELETED = "deleted"  # subfolder for steps that are being deleted


@functools.cache
def orbax() -> Any:
    """Import jax and orbax on first use (it takes seconds), silence them, and return `orbax.checkpoint`.

    Keeps JAX off the accelerator, whose memory it would reserve, unless the program imported JAX before or set
    JAX_PLATFORMS; and keeps JAX from intercepting SIGTERM.
    """
    configure_platform = "jax" not in sys.modules and "JAX_PLATFORMS" not in os.environ
    import jax

    if configure_platform:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_preemption_service", False)
    import absl.logging  # before orbax, so that absl creates the logger with its own class
    import orbax.checkpoint

    absl.logging.get_absl_logger().addFilter(_log_filter)
    return orbax.checkpoint


def _log_filter(record: logging.LogRecord) -> bool:
    # orbax logs every step it takes, and also logs the exceptions that it raises.
    from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not from_orbax or (record.levelno >= logging.ERROR and not record.exc_info)


# Tensors and NumPy arrays


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copy to host memory; bfloat16 becomes ml_dtypes.bfloat16, bit for bit."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    if host.dtype == torch.bfloat16:
        return host.view(torch.uint16).numpy().view(BFLOAT16)
    return host.numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """Return a copy in memory of torch, which aligns it as it does any tensor: products on a CPU round by alignment."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).clone()
    return torch.from_numpy(array).clone()


# Steps in a folder


def steps(folder: Path) -> list[int]:
    """Return the complete steps in ascending order; orbax gives a step its name when it is complete."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())
    return sorted(int(name) for name in names if name == str(int(name)))


def remove_partial_steps(folder: Path) -> None:
    """Remove deleted steps and the temporary folders of killed or failed saves, now rather than in the background."""
    for path in [folder / DELETED, *folder.glob(f"*{orbax().utils.TMP_DIR_SUFFIX}*")]:
        for _ in range(20):  # writes that were under way when a save failed may still add files
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
            time.sleep(0.05)


# Writing: orbax calls the handler of an item, which calls `write` with the item's folder


@dataclasses.dataclass(frozen=True, eq=False)
class DeferredArray:
    """A leaf for PyTreeSave; the first leaf's `write(folder)` writes the values of all leaves."""

    write: Callable[[Path], None]


def arrays_item(names: Iterable[str], write: Callable[[Path], None]) -> Any:
    """Return the save arguments of the PyTree {"a": {"b": array}} for the names "a.b" of arrays with elements.

    `write` is called with the item's folder, and has to call `write_blocks` there in every process.
    """
    return orbax().args.PyTreeSave(tree.nest(dict.fromkeys(names, DeferredArray(write))))


def arrays_handler() -> Any:
    ocp = orbax()

    class DeferredArrayHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            values[0].write(Path(infos[0].parent_dir))
            return []

    registry = ocp.type_handlers.create_type_handler_registry((DeferredArray, DeferredArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


# Blocks of arrays


class Block(NamedTuple):
    """A part of an array to write; all blocks of an array have one size."""

    values: np.ndarray
    shape: Sequence[int]  # of the full array
    offsets: Sequence[int]  # of the block in it


def chunk_shape(block: np.ndarray, limit_bytes: int = 2**24) -> list[int]:
    """Return the shape of even, small chunks of a block: who reads a part of a block reads whole chunks."""
    chunk = list(block.shape)
    for dim in range(len(chunk)):
        while math.prod(chunk) * block.itemsize > limit_bytes and chunk[dim] % 2 == 0:
            chunk[dim] //= 2
    return chunk


def write_blocks(folder: Path, process: int, blocks: Mapping[str, Block]) -> None:
    """Write the named blocks of one process into an arrays item; raises any type of error, after all writes ended."""
    import tensorstore

    context = _context()
    arrays = {}
    for name, block in blocks.items():
        spec = {
            **_array_spec(folder / f"ocdbt.process_{process}", name),
            "dtype": block.values.dtype.name,
            # Weights hardly compress, and writing them uncompressed is three times as fast.
            "metadata": {"shape": [*block.shape], "chunks": chunk_shape(block.values), "compressor": None},
            "store_data_equal_to_fill_value": True,
        }
        arrays[name] = tensorstore.open(spec, create=True, open=True, context=context)
    _wait_for_all(arrays.values())
    writes = []
    for name, block in blocks.items():
        index = tuple(slice(start, start + size) for start, size in zip(block.offsets, block.values.shape))
        writes.append(arrays[name].result()[index].write(block.values, can_reference_source_data_indefinitely=True))
    _wait_for_all(writes)


def _wait_for_all(futures: Iterable[Any]) -> None:
    """Wait until all futures have ended, and only then raise the first error: nothing may write to the folder later."""
    for error in [future.exception() for future in futures]:
        if error is not None:
            raise error


def read_blocks(folder: Path, blocks: Mapping[str, tuple[Sequence[int], tuple[slice, ...]]]) -> dict[str, np.ndarray]:
    """Read blocks, {name: (shape of the full array, index of the block)}, of an arrays item.

    Arrays that are missing or have another shape are skipped.
    """
    import tensorstore

    context = _context()
    arrays = {name: tensorstore.open(_array_spec(folder, name), read=True, context=context) for name in blocks}
    reads = {}
    for name, (shape, index) in blocks.items():
        error = arrays[name].exception()
        missing = error is not None and str(error).startswith("NOT_FOUND")
        if not missing and arrays[name].result().shape == tuple(shape):
            reads[name] = arrays[name].result()[index].read()
    return {name: np.asarray(read.result()) for name, read in reads.items()}


def _context() -> Any:
    import tensorstore

    # All arrays of an item share one database and one cache of its index.
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": 10**8}, "file_io_concurrency": {"limit": 64}})


def _array_spec(folder: Path, name: str) -> dict[str, Any]:
    # As orbax has it: small values are stored in the index, under its checksum.
    index = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"}
    base = {"driver": "file", "path": f"{folder}/", "file_io_locking": {"mode": "non_atomic"}}
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/", "config": index}
    return {"driver": "zarr", "kvstore": store, "recheck_cached_data": False, "recheck_cached_metadata": False}
