"""What all tests share: one thread a test, a worker per core, no GPU test without a GPU, one measured speed."""

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each of the workers compiles by itself

import pytest
import torch

from nanochat.distributed import runtime

# A shell that starts the tests in the background lets them ignore Ctrl-C, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The models are tiny: a second thread only waits, ten times as long as the work takes when the cores are busy.
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker per core for folders of tests; none for single files and for the tests of the one GPU."""
    single = config.args and all(".py" in arg for arg in config.args)
    return 0 if single or config.option.markexpr == "gpu" else min(os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_measurement() -> Iterator[None]:
    """Let the runs of all tests share what each would measure for its MFU: that takes longer than their training."""
    with mock.patch.object(runtime, "measure_matmul", functools.cache(runtime.measure_matmul)):
        yield


@pytest.fixture(autouse=True)
def same_excepthook() -> Iterator[None]:
    """Undo what init_process_group does to tracebacks: it puts the rank before each line."""
    before = sys.excepthook
    yield
    sys.excepthook = before


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base folder of the tests of a file: short documents and a tokenizer."""
    from tiny_run import base_folder

    with base_folder(tmp_path_factory.mktemp("base")) as folder:
        yield folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path
