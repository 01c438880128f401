"""What all tests share: one thread a test, and no GPU test without a GPU."""

import pytest
import torch

# The models are tiny: a second thread only waits, ten times as long as the work takes when the cores are busy.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
