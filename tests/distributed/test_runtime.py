"""The runtime: torchrun's environment, devices, dtypes, the process group, folders, matmul limits."""

import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from nanochat.config import UserError, base_dir
from nanochat.distributed import Runtime, runtime
from nanochat.train import build


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuda: int = 0,
    mps: bool = False,
    capability: int = 8,
    macos: int = 14,
    kernels: tuple[str, ...] = ("sm_70", "sm_75", "sm_80", "sm_90", "sm_100"),
) -> list[object]:
    """Make torch report `cuda` GPUs of a capability, or MPS; returns the devices made current."""
    chosen: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
    return chosen


@pytest.mark.parametrize("env", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    pretend(monkeypatch)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert runtime.init() == Runtime(0, 0, 1, 1, 0, torch.device("cpu"), torch.float32)
    assert not dist.is_initialized()
    assert runtime.all_reduce_max(3) == 3 and runtime.all_reduce_sum([1.5, 2]) == [1.5, 2]
    runtime.barrier()


@pytest.mark.parametrize(
    ("machine", "device", "expected"),
    [
        ({"cuda": 1}, "auto", "cuda:0"),
        ({"cuda": 1, "mps": True}, "auto", "cuda:0"),
        ({"mps": True}, "auto", "mps"),
        ({}, "auto", "cpu"),
        ({"cuda": 1}, "cpu", "cpu"),
        ({"cuda": 1}, "cuda", "cuda:0"),
        ({"mps": True}, "mps", "mps"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, machine: dict, device: str, expected: str) -> None:
    chosen = pretend(monkeypatch, **machine)
    assert runtime.init(device).device == torch.device(expected)
    assert chosen == ([torch.device(expected)] if expected.startswith("cuda") else [])


@pytest.mark.parametrize(
    ("machine", "device", "message"),
    [
        ({}, "cuda", "device=cuda: this machine or this torch build has no CUDA; set device=cpu"),
        ({"cuda": 1}, "mps", "device=mps: this machine or this torch build has no MPS; set device=cpu"),
        ({}, "tpu", "device=tpu: expected auto, cpu, cuda or mps"),
        ({"cuda": 2}, "auto", "rank 2 has no GPU: 2 here; lower --nproc_per_node to 2"),
        ({"mps": True}, "auto", "device=mps runs in one process: drop --nproc_per_node or set device=cpu"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, machine: dict, device: str, message: str) -> None:
    pretend(monkeypatch, **machine)
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        runtime.init(device)
    assert str(caught.value).startswith(message) and not dist.is_initialized()


@pytest.mark.parametrize(
    ("machine", "dtype", "expected"),
    [
        ({}, "auto", torch.float32),
        ({"mps": True}, "auto", torch.bfloat16),
        ({"mps": True, "macos": 13}, "auto", torch.float16),
        ({"mps": True}, "float32", torch.float32),
        ({"cuda": 1, "capability": 7}, "auto", torch.float16),
        ({"cuda": 1, "capability": 8}, "auto", torch.bfloat16),
        ({"cuda": 1, "capability": 10}, "auto", torch.bfloat16),
        ({"cuda": 1, "capability": 7}, "float16", torch.float16),
        ({"cuda": 1, "capability": 9}, "float32", torch.float32),
        ({}, "bfloat16", torch.bfloat16),
    ],
)
def test_dtypes(monkeypatch: pytest.MonkeyPatch, machine: dict, dtype: str, expected: torch.dtype) -> None:
    pretend(monkeypatch, **machine)
    assert runtime.init(dtype=dtype).compute_dtype == expected


def test_a_dtype_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=1, capability=7)
    with pytest.raises(UserError, match="dtype=bfloat16: this GPU is older than Ampere; set dtype=float16"):
        runtime.init(dtype="bfloat16")
    pretend(monkeypatch, mps=True, macos=13)
    with pytest.raises(UserError, match="dtype=bfloat16: it needs macOS 14; set dtype=float16"):
        runtime.init(dtype="bfloat16")
    with pytest.raises(UserError, match="dtype=int4: expected auto, float32, bfloat16, float16"):
        runtime.init(dtype="int4")


def test_a_gpu_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=1, capability=7, kernels=("sm_75", "sm_80", "sm_90", "compute_90"))
    with pytest.raises(UserError, match=r"no kernels for this Tesla V100-SXM2-16GB \(sm_70\): install .* \(cu126\)"):
        runtime.init()
    pretend(monkeypatch, cuda=1, capability=12)
    with pytest.raises(UserError, match=r"\(sm_120\): install the torch wheel built for a newer CUDA"):
        runtime.init()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ["sm_80"], True),  # machine code runs on later minor versions
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX is compiled for what came later
        ((7, 0), ["sm_75", "compute_75"], False),
        ((9, 4), ["gfx90a", "gfx942"], True),  # ROCm
    ],
)
def test_machine_code_and_ptx(capability: tuple[int, int], architectures: list[str], runs: bool) -> None:
    assert runtime.has_kernels(capability, architectures) == runs


def test_float32_uses_tf32_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, expected in [({"cuda": 1}, ["high"]), ({"mps": True}, []), ({}, [])]:
        pretend(monkeypatch, **machine)
        set_to: list[str] = []
        monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
        runtime.init()
        assert set_to == expected


def two_ranks() -> list[object]:
    made = runtime.init("cpu", quiet=True)
    again = runtime.init("cpu")  # a second call joins no second group
    results = [again == made, runtime.all_reduce_max(7 * made.rank), runtime.all_reduce_sum([1.0, made.rank + 0.5])]
    print("heard")
    runtime.close()
    return [*results, dist.is_initialized(), made.rank, made.local_rank, made.world_size, made.node_ranks]


@pytest.mark.slow
def test_two_ranks_agree_and_the_first_one_prints() -> None:
    with ranks.start(2, two_ranks) as job:
        finished = job.wait()
    assert [f.value for f in finished] == [[True, 7, [2.0, 2.0], False, rank, rank, 2, 2] for rank in (0, 1)]
    assert [f.out for f in finished] == ["heard\n", ""]


def test_base_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    assert base_dir() == tmp_path / ".cache" / "nanochat"
    for given, folder in {"": ".cache/nanochat", "~/x": "x", str(tmp_path / "y"): "y"}.items():
        monkeypatch.setenv("NANOCHAT_BASE_DIR", given)
        assert base_dir() == tmp_path / folder
    assert not list(tmp_path.iterdir())


def test_a_known_gpu_has_the_limits_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert runtime.peak_flops(torch.device("cuda"), torch.bfloat16) == (989e12, "data sheet of H100")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(runtime, "measure_matmul", lambda size, device, dtype: 1e12 * size)
    measured = runtime.peak_flops(torch.device("cuda"), torch.float32)
    assert measured == (8192e12, "measured, 8192x8192x8192 matmul")


def test_the_limit_of_a_cpu_is_measured() -> None:
    cpu, random_state = torch.device("cpu"), torch.get_rng_state()
    limit, source = runtime.peak_flops(cpu, torch.float32)
    assert 1e9 < limit < 1e14 and source.startswith("measured")
    runtime.measure_matmul(8, cpu, torch.float32)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("gpus", "ranks", "world", "shown"),
    [
        (8, 1, 1, "1 of the 8 GPUs of this machine; all: torchrun --nproc_per_node=8 launch.py --set 'name=a b'"),
        (4, 2, 2, "2 of the 4 GPUs of this machine; all: torchrun --nproc_per_node=4 launch.py"),
        (8, 4, 16, "4 of the 8 GPUs of this machine; all: torchrun --nproc_per_node=8 … launch.py"),
        (8, 8, 16, ""),
        (1, 1, 1, ""),
        (0, 1, 1, ""),
    ],
)
def test_idle_gpus_are_named_with_the_command_that_uses_them(
    gpus: int, ranks: int, world: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, cuda=gpus)
    monkeypatch.setattr(sys, "argv", ["launch.py", "--set", "name=a b"])
    device = torch.device("cuda" if gpus else "cpu")
    build.advise_all_gpus(Runtime(0, 0, world, ranks, 0, device, torch.float32))
    out = capsys.readouterr().out
    assert shown in out and bool(shown) == bool(out)


@pytest.mark.gpu
def test_a_gpu() -> None:
    made = runtime.init()
    assert made.device == torch.device("cuda", 0)
    capability = torch.cuda.get_device_capability(made.device)
    assert made.compute_dtype == (torch.bfloat16 if capability >= (8, 0) else torch.float32)
    limit, _ = runtime.peak_flops(made.device, made.compute_dtype)
    # No product runs faster than the data sheet says, and a large one comes near.
    assert 0.3 * limit < runtime.measure_matmul(8192, made.device, made.compute_dtype) < 1.05 * limit


MEMORY = """
import torch
from nanochat import distributed
before = distributed.peak_memory_bytes(torch.device("cpu"))
block = torch.ones(256 << 20, dtype=torch.uint8)
print(before, distributed.peak_memory_bytes(torch.device("cpu")) - before)
"""


@pytest.mark.slow
def test_peak_memory_is_the_process_s_own_and_in_bytes() -> None:
    block = torch.ones(1 << 30, dtype=torch.uint8)  # does not count in the peak of a process started meanwhile
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=root)
    before, grown = map(int, done.stdout.split())
    assert block.all() and 20 << 20 < before < 800 << 20
    assert 192 << 20 < grown < 384 << 20
