"""Tensors on disk through orbax: what `checkpoint` needs of jax, orbax and NumPy, and nothing about training.

Tensors travel to orbax as NumPy arrays. That keeps int64 and bfloat16 bit for bit without `jax_enable_x64`, a switch
for the whole process that would change the results of a program that uses JAX itself. jax and orbax are imported
when a function here is first called, since that takes about two seconds.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
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

    absl.logging.get_absl_logger().addFilter(_is_news)
    sys.unraisablehook = functools.partial(_without_echoes, sys.unraisablehook)

    return orbax.checkpoint


def _is_news(record: logging.LogRecord) -> bool:
    # orbax tells of every step it takes, and logs as an error what it raises as well.
    from_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not from_orbax or (record.levelno >= logging.ERROR and not record.exc_info)


def _without_echoes(hook: Callable[[Any], Any], unraisable: Any) -> None:
    # After one tensor failed orbax closes its event loop, and a traceback for each of the others would follow.
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        hook(unraisable)


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


def open_manager(folder: Path, policy: Any, score: Callable[[Any], float], *, asynchronous: bool) -> Any:
    """Return orbax's CheckpointManager of `folder`, after clearing away what a killed one left.

    Args:
        folder: exists; its steps are the subfolders with numbers for names.
        policy: orbax's PreservationPolicy, which says after each save what stays.
        score: of a step's metrics, the lower the better.
        asynchronous: write in the background.
    """
    ocp = orbax()
    clear(folder)
    options = ocp.CheckpointManagerOptions(
        create=False,
        best_fn=score,
        best_mode="min",
        preservation_policy=policy,
        todelete_subdir=DELETED,  # a kill in the middle of a deletion must not leave half a step under its name
        enable_async_checkpointing=asynchronous,
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


def arrays_item(arrays: Mapping[str, np.ndarray]) -> Any:
    """Return what to save {"a.b": array} by, as the PyTree {"a": {"b": array}}; none may be empty (orbax's rule)."""
    return orbax().args.PyTreeSave(tree.nest(arrays))


def json_item(values: Mapping[str, Any]) -> Any:
    """Return what to save JSON values by."""
    return orbax().args.JsonSave(dict(values))


def files_item(contents: Mapping[str, bytes]) -> Any:
    """Return what to save {file name: content} by."""
    return _files_item()[1](dict(contents))


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Read the named arrays of a PyTree item, and no others.

    Returns:
        {"a.b": array}. Only look for arrays in it: for a name that the item lacks orbax returns the request itself.

    Raises:
        Exception: of any kind, where the item is damaged.
    """
    ocp = orbax()
    request = tree.nest(dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)))
    if not request:
        return {}
    with contextlib.closing(ocp.Checkpointer(_arrays_handler())) as reader:
        args = ocp.args.PyTreeRestore(request, restore_args=request, partial_restore=True)
        return dict(tree.flatten(reader.restore(path, args=args)))


def _arrays_handler() -> Any:
    ocp = orbax()
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)  # they are copies already
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy_handler))
    # Weights hardly compress, and writing them is three times as fast without the attempt.
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


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
