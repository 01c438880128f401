"""Tensors on disk through orbax: what `checkpoint` needs of jax, orbax, tensorstore and NumPy, and nothing on training.

orbax makes the folders, names a step when it is complete, and says which ones stay; the process that is rank 0 runs
it. The arrays themselves go into orbax's layout (zarr arrays in one OCDBT database that is merged from a part of
every process) by tensorstore, orbax's own engine, as NumPy arrays: each process writes its blocks of them. That keeps
int64 and bfloat16 bit for bit without `jax_enable_x64`, a switch for the whole process that would change the results
of a program that uses JAX itself, and it needs no `jax.distributed`, whose service would end the surviving ranks when
one is lost. jax, orbax and tensorstore are imported when a function here first needs them; they take seconds.
"""

import dataclasses
import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat import tree

DELETED = "deleted"  # the subfolder for steps on their way out


@functools.cache
def orbax() -> Any:
    """Import jax and orbax, keep them quiet, and return `orbax.checkpoint`.

    JAX stays off the accelerator, whose memory it would fill, unless the program imported it before or chose by
    JAX_PLATFORMS; and it must not take SIGTERM away from the program.
    """
    ours = "jax" not in sys.modules and "JAX_PLATFORMS" not in os.environ
    import jax

    if ours:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_preemption_service", False)
    import absl.logging  # first, for it to make the logger of its own class
    import orbax.checkpoint

    absl.logging.get_absl_logger().addFilter(_log_filter)
    return orbax.checkpoint


def _log_filter(record: logging.LogRecord) -> bool:
    # orbax tells of every step it takes, and logs as an error what it raises as well.
    from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not from_orbax or (record.levelno >= logging.ERROR and not record.exc_info)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a copy in host memory; bfloat16, which NumPy does not have, becomes ml_dtypes' bit for bit."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    if host.dtype == torch.bfloat16:
        return host.view(torch.uint16).numpy().view(numpy_dtype("bfloat16"))
    return host.numpy()


def to_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor over the memory of `array`, or over a copy where that is read-only or not contiguous."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's dtype of that name, bfloat16 included."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def open_orbax_manager(folder: Path, policy: Any, score: Callable[[Any], float]) -> Any:
    """Return orbax's CheckpointManager of `folder`, after clearing away what a killed one left.

    Its `save` returns when the step is complete: who wants to go on meanwhile calls it in a thread.

    Args:
        folder: exists; its steps are the subfolders with numbers for names.
        policy: orbax's PreservationPolicy, which says after each save what stays.
        score: of a step's metrics, the lower the better.
    """
    ocp = orbax()
    clear(folder)
    options = ocp.CheckpointManagerOptions(
        create=False,
        best_fn=score,
        best_mode="min",
        preservation_policy=policy,
        todelete_subdir=DELETED,  # a kill in the middle of a deletion must not leave half a step under its name
        enable_async_checkpointing=False,
    )
    items = {"state": _arrays_handler(), "arrays": _arrays_handler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers={**items, "files": _files_item()[0]()})


def steps(folder: Path) -> list[int]:
    """Return the complete steps in `folder`, in rising order; orbax gives a step its name when it is complete."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def clear(folder: Path) -> None:
    """Remove deleted steps, and the temporary folders of saves that were killed or failed.

    At once, and not by orbax's `cleanup_tmp_directories`, which works in the background: the room is needed now.
    """
    for path in [folder / DELETED, *folder.glob(f"*{orbax().utils.TMP_DIR_SUFFIX}*")]:
        shutil.rmtree(path, ignore_errors=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A part of an array to be written: its values, the shape of the whole, where it begins, the shape of its pieces.

    The blocks of one array are of one size; so are the pieces, which divide the block, and are what is read at once.
    """

    values: np.ndarray
    shape: Sequence[int]
    offsets: Sequence[int]
    chunk: Sequence[int]


def whole_block(values: np.ndarray) -> Block:
    """Return the block that is all of an array."""
    return Block(values, values.shape, (0,) * values.ndim, values.shape)


def write_blocks(folder: Path, process: int, blocks: Mapping[str, Block]) -> None:
    """Write the blocks of one process, by name, into an arrays item that orbax is about to complete.

    Raises:
        Exception: of any kind; nothing is being written any more then.
    """
    import tensorstore

    context = _context()
    opened = {}
    for name, block in blocks.items():
        spec = {
            **_array_spec(folder / f"ocdbt.process_{process}", name),
            "dtype": block.values.dtype.name,
            # Weights hardly compress, and writing them is three times as fast without the attempt.
            "metadata": {"shape": [*block.shape], "chunks": [*block.chunk], "compressor": None},
            "store_data_equal_to_fill_value": True,
        }
        opened[name] = tensorstore.open(spec, create=True, open=True, context=context)
    writes = []
    for name, block in blocks.items():
        place = tuple(slice(begin, begin + size) for begin, size in zip(block.offsets, block.values.shape))
        writes.append(opened[name].result()[place].write(block.values, can_reference_source_data_indefinitely=True))
    failures = [failure for failure in [write.exception() for write in writes] if failure is not None]
    if failures:
        raise failures[0]


def read_blocks(folder: Path, wanted: Mapping[str, tuple[Sequence[int], tuple[slice, ...]]]) -> dict[str, np.ndarray]:
    """Read a part of each of these arrays of an arrays item; one that it lacks in this shape is left out.

    Args:
        wanted: name → shape of the whole, index of the part.

    Raises:
        ValueError: the item is damaged.
    """
    import tensorstore

    context = _context()
    opened = {name: tensorstore.open(_array_spec(folder, name), read=True, context=context) for name in wanted}
    reads = {}
    for name, (shape, place) in wanted.items():
        if not _is_missing(opened[name].exception()) and opened[name].result().shape == tuple(shape):
            reads[name] = opened[name].result()[place].read()
    return {name: np.asarray(read.result()) for name, read in reads.items()}


def _context() -> Any:
    import tensorstore

    # One context for all arrays of an item: they share the database, and one cache of its index.
    return tensorstore.Context({"cache_pool": {"total_bytes_limit": 10**8}, "file_io_concurrency": {"limit": 64}})


def _array_spec(folder: Path, name: str) -> dict[str, Any]:
    # As orbax has it: small values lie in the index, under its checksum.
    index = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"}
    base = {"driver": "file", "path": f"{folder}/", "file_io_locking": {"mode": "non_atomic"}}
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/", "config": index}
    return {"driver": "zarr", "kvstore": store, "recheck_cached_data": False, "recheck_cached_metadata": False}


def _is_missing(error: BaseException | None) -> bool:
    return error is not None and str(error).startswith("NOT_FOUND")


@dataclasses.dataclass(frozen=True, eq=False)
class _DeferredArrays:
    """A leaf whose values are written, with those of all other leaves, by calling `write` with the item's folder."""

    write: Callable[[Path], None]


def arrays_item(names: Iterable[str], write: Callable[[Path], None]) -> Any:
    """Return what to save arrays "a.b" by, as the PyTree {"a": {"b": array}}; none may be empty (orbax's rule).

    Args:
        write: called with the item's folder; calls `write_blocks` here and makes other processes do so.
    """
    return orbax().args.PyTreeSave(tree.nest(dict.fromkeys(names, _DeferredArrays(write))))


def json_item(values: Mapping[str, Any]) -> Any:
    """Return what to save JSON values by."""
    return orbax().args.JsonSave(dict(values))


def files_item(contents: Mapping[str, bytes]) -> Any:
    """Return what to save {file name: content} by."""
    return _files_item()[1](dict(contents))


def _arrays_handler() -> Any:
    ocp = orbax()

    class PromiseHandler(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
            values[0].write(Path(infos[0].parent_dir))
            return []

    registry = ocp.type_handlers.create_type_handler_registry((_DeferredArrays, PromiseHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


@functools.cache
def _files_item() -> tuple[Any, Any]:
    """Return what teaches orbax to store plain files: a handler, and the arguments to save by."""
    ocp = orbax()

    class FilesHandler(ocp.CheckpointHandler):
        def save(self, directory: Any, args: Any) -> None:
            for name, content in args.contents.items():
                (directory / name).write_bytes(content)

        def restore(self, directory: Any, args: Any = None) -> dict[str, bytes]:
            return {path.name: path.read_bytes() for path in directory.iterdir()}

    @ocp.args.register_with_handler(FilesHandler, for_save=True, for_restore=True)
    @dataclasses.dataclass
    class FilesArgs(ocp.args.CheckpointArgs):
        contents: dict[str, bytes] = dataclasses.field(default_factory=dict)

    return FilesHandler, FilesArgs
