"""What all tests share: one thread a test, a worker per core, no GPU test without a GPU, one measured speed."""

import functools
import os
import signal
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


# The files that take longest, the longest first: a worker that gets one of them last keeps the other waiting.
LONG_FILES = [
    "test_sharding.py",
    "test_sharded_checkpoint.py",
    "test_bench.py",
    "test_sharded_pretrain.py",
    "test_speedrun.py",
    "test_page.py",
    "test_engine.py",
    "test_research.py",
    "test_huggingface.py",
    "test_sweep.py",
    "test_load.py",
    "test_page_history.py",
    "test_drain.py",
    "test_lm_eval.py",
    "test_noise_scale.py",
    "test_program.py",
    "test_overlap.py",
    "test_page_looks.py",
    "test_openai.py",
    "test_app.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_measurement() -> Iterator[None]:
    """Let the runs of all tests share what each would measure for its MFU: that takes longer than their training."""
    with mock.patch.object(runtime, "measure_matmul", functools.cache(runtime.measure_matmul)):
        yield


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
