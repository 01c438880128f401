"""The GPU table."""

import pytest

from nanochat.distributed import hardware


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
    ],
)
def test_gpu_spec_is_found_by_cuda_device_name(device: str, name: str | None) -> None:
    assert hardware.gpu_spec(device) == (hardware.GPU_SPECS[name] if name else None)
