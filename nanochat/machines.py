"""What GPUs can do and hold, for plans and for the MFU: one table, read by `runtime` and by `planner`.

Rates are those of the vendors' data sheets, dense, without sparsity. Memory is what CUDA reports on such a card: the
data sheet's less what driver and error correction keep. Prices are no facts but assumptions, to be set anew for a
budget that matters.
"""

import re
from typing import NamedTuple

GIB = 2**30


class Machine(NamedTuple):
    """One type of GPU.

    Attributes:
        device: what CUDA calls it, or the beginning of that.
        memory_gib: memory that CUDA reports. half_flops, single_flops: limit of matrix products in FLOP/s: 16-bit with
            float32 sums, and float32 without TF32. fp8_flops: of 8-bit ones; None where there are none in torch.
        link_bytes_per_second: to the other GPUs of its node, in one direction (NVLink, else PCIe as measured).
        network_bytes_per_second: its share of the node's network, in one direction; assumed.
        dollars_per_hour: assumed.
    """

    device: str
    memory_gib: float
    half_flops: float
    single_flops: float
    fp8_flops: float | None
    link_bytes_per_second: float
    network_bytes_per_second: float
    dollars_per_hour: float


MACHINES = {
    "rtx3070": Machine("NVIDIA GeForce RTX 3070", 7.8, 40.6e12, 20.3e12, None, 20e9, 1e9, 0.10),
    "rtx3060": Machine("NVIDIA GeForce RTX 3060", 11.7, 25.5e12, 12.7e12, None, 20e9, 1e9, 0.10),
    "rtx4070": Machine("NVIDIA GeForce RTX 4070", 11.7, 58.3e12, 29.1e12, 116.6e12, 20e9, 1e9, 0.20),
    "rtx3090": Machine("NVIDIA GeForce RTX 3090", 23.6, 71e12, 35.6e12, None, 20e9, 1e9, 0.25),
    "rtx4090": Machine("NVIDIA GeForce RTX 4090", 23.5, 165e12, 82.6e12, 330e12, 20e9, 1e9, 0.40),
    "rtx5090": Machine("NVIDIA GeForce RTX 5090", 31.3, 209e12, 105e12, 419e12, 40e9, 1e9, 0.70),
    "l4": Machine("NVIDIA L4", 22.0, 121e12, 30.3e12, 242e12, 20e9, 3e9, 0.70),
    "l40s": Machine("NVIDIA L40S", 44.4, 362e12, 91.6e12, 733e12, 20e9, 12.5e9, 1.00),
    "a100-40gb": Machine("NVIDIA A100-SXM4-40GB", 39.4, 312e12, 19.5e12, None, 300e9, 25e9, 1.30),
    "a100-80gb": Machine("NVIDIA A100", 79.1, 312e12, 19.5e12, None, 300e9, 25e9, 1.80),
    "h100-pcie": Machine("NVIDIA H100 PCIe", 79.1, 756e12, 51e12, 1513e12, 50e9, 25e9, 2.40),
    "h100": Machine("NVIDIA H100", 79.1, 989e12, 67e12, 1979e12, 450e9, 50e9, 3.00),
    "h200": Machine("NVIDIA H200", 139.7, 989e12, 67e12, 1979e12, 450e9, 50e9, 3.50),
    "b200": Machine("NVIDIA B200", 178.3, 2250e12, 75e12, 4500e12, 900e9, 50e9, 5.00),
    "gb200": Machine("NVIDIA GB200", 184.0, 2500e12, 80e12, 5000e12, 900e9, 50e9, 6.00),
}  # fmt: skip


def of_device(device: str) -> Machine | None:
    """Return the row of a GPU by what CUDA calls it ("NVIDIA H100 80GB HBM3"), or None; the longest name counts."""
    rows = [m for m in MACHINES.values() if re.match(rf"{re.escape(m.device)}\b(?! (Ti|SUPER|Laptop|Mobile))", device)]
    return max(rows, key=lambda m: len(m.device), default=None)
