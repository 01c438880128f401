"""The benchmarks: their numbers are right where that can be known, and every code path runs on a CPU."""

import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from experiments import _bench, _codegen, _jobs, _members, _trace, bench_data, bench_infer, bench_train, pretrain
from experiments._bench import Limits
from experiments._trace import Trace
from nanochat import model
from nanochat.config import UserError, base_dir, override
from nanochat.data import tokenizer
from nanochat.distributed import Runtime
from nanochat.model import attention

CPU = torch.device("cpu")
HERE = Runtime(0, 0, 1, 1, 0, device=CPU, compute_dtype=torch.float32)
TINY = ["depth=1", "width=64", "head_dim=32", "vocab_size=128", "sequence_len=32", "batch_size=2", "rounds=1"]
TINY += ["compile=false"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    return {"name": name, "ts": ts, "dur": dur, "cat": cat, "ph": "X"}


def test_gpu_profile_has_busy_time_and_gaps() -> None:
    kernels = [
        event("nvjet_tst_gemm", 100, 300),
        event("flash_fwd_kernel", 300, 200),  # overlaps the first by 100
        event("triton_poi_fused_add", 600, 100),
        event("Memcpy HtoD", 700, 50, "gpu_memcpy"),
        event("aten::mm", 0, 900, "cpu_op"),  # not GPU time
    ]
    profile = _trace.profile(Trace(0, 1000e-6, kernels))
    assert profile.busy_seconds == pytest.approx(550e-6)
    kinds = {"products": 300e-6, "attention": 200e-6, "elementwise (compiled)": 100e-6, "copies": 50e-6}
    assert profile.kinds == pytest.approx(kinds)
    assert profile.top[0][0] == "nvjet_tst_gemm" and profile.top[0][2] == 1
    (first, *before), (second, *between) = profile.gaps
    assert before == ["start of the step", "nvjet_tst_gemm"] and between == ["flash_fwd_kernel", "triton_poi_fused_add"]
    assert (first, second) == pytest.approx((100e-6, 100e-6))


def test_exposed_communication_excludes_overlap_with_kernels() -> None:
    kernels = [event("nvjet", 0, 100), event("ncclDevKernel_AllGather", 50, 100), event("ncclDevKernel_X", 200, 10)]
    assert _trace.communication(Trace(0, 1e-3, kernels)) == pytest.approx((110e-6, 60e-6))


def test_trace_has_only_the_second_call(tmp_path: Path) -> None:
    x = torch.ones(64, 64)
    trace = _trace.trace(lambda: x @ x, HERE, path=tmp_path / "trace.json")
    (product,) = [e for e in trace.events if e["name"] == "aten::mm"]
    assert (tmp_path / "trace.json").read_text().count('"aten::mm"') == 2
    assert 0 < product["dur"] / 1e6 < trace.seconds and trace.host_times["aten::mm"] > 0


@pytest.mark.gpu
def test_host_synchronizations_are_counted() -> None:
    x = torch.ones(8, device="cuda")
    assert _trace.host_syncs(lambda: x * 2) == []
    assert len(_trace.host_syncs(lambda: [float(x.sum()), float(x.sum())])) == 2


def test_roofline_agrees_with_flop_counts() -> None:
    shape = model.ModelConfig(1024, 512, 4, 2, 2, 256, "SSSL")
    limits = Limits(1e12, 2e12, 1e11)
    dense, fp8 = (_bench.roofline(shape, 2, limits, torch.bfloat16, fp8) for fp8 in (False, True))
    tokens = 2 * 1024
    keys = sum(12 * shape.n_embd * w for w in shape.windows)
    assert dense["products"] == pytest.approx((model.flops_per_token(shape) - keys) * tokens / 1e12)
    visible = sum(int(attention.mask(1024, w).sum()) for w in shape.windows) / 1024
    assert dense["attention"] == pytest.approx(14 * shape.n_embd * visible * tokens / 1e12, rel=0.02)
    assert dense["quantize"] == 0
    assert fp8["products"] < 0.6 * dense["products"] and fp8["quantize"] > 0
    assert all(fp8[name] == dense[name] for name in ("attention", "muon", "optimizer"))
    twice = _bench.roofline(shape, 2, limits, torch.bfloat16, True, micro_batches=2)
    assert all(twice[name] == fp8[name] * (1 if name in ("muon", "optimizer") else 2) for name in fp8)


def run_python(code: str, seconds: float = 20, **options: Any) -> _jobs.RunResult:
    return _jobs.run_subprocess([sys.executable, "-c", code], seconds=seconds, **options)


def test_job_returns_its_last_json_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # torchrun's
    code = """import os; print('x', os.environ.get('RANK')); print('{"bench": "a", "n": 3}'); print('bye')"""
    outcome = run_python(code, log=tmp_path / "log.txt")
    assert outcome == ({"bench": "a", "n": 3}, "", ["x None", '{"bench": "a", "n": 3}', "bye"])
    assert (tmp_path / "log.txt").read_text().splitlines() == outcome.lines


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; sys.exit('error: no such kernel; set another')", "no such kernel; set another"),
        ("raise ValueError('of a bug')", "ValueError: of a bug"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("raise SystemExit(7)", "exit code 7"),
    ],
)
def test_failed_job_has_a_one_line_error(code: str, error: str) -> None:
    assert run_python(code)[:2] == (None, error)


def test_failed_launch_has_a_one_line_error() -> None:
    outcome = _jobs.run_subprocess(_jobs.launch_command("bench_train", {"rounds": -1}), seconds=60)
    assert outcome[:2] == (None, "rounds=-1: must be at least 0")


@pytest.mark.slow
def test_hanging_job_is_stopped_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    code = f"""import subprocess, sys, time; print('working'); print('{{"bench": "a"}}')
subprocess.Popen([sys.executable, '-c', {child!r}])"""
    code += "; time.sleep(60)"
    begin = time.monotonic()
    assert run_python(code, seconds=1) == ({"bench": "a"}, "stopped after 1 s", ["working", '{"bench": "a"}'])
    assert time.monotonic() - begin < 20
    time.sleep(2.5)
    assert not alive.exists()


def test_settings_round_trip_through_the_command_line() -> None:
    settings = ["compiles=true,false", r"kernels=auto,a\,b", "depth=none", "compile=false", "train.memory_budget=0.5"]
    config = override(bench_train.config(), settings)
    values = {"compiles": config.compiles, "kernels": config.kernels, "depth": None, "compile": False}
    words = _jobs.launch_command("bench_train", values | {"train.memory_budget": 0.5}, 2)
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    given = [word for before, word in itertools.pairwise(words) if before == "--set"]
    assert override(bench_train.config(), given) == config


def test_depth_gives_the_shape_of_pretraining() -> None:
    config, shape = bench_train.resolve(override(bench_train.config(), ["depth=20"]))
    assert shape == pretrain.resolve(pretrain.Config(depth=20), None)[0]
    assert (config.batch_size, config.width) == (pretrain.Config().rows, 1280)
    config, small = bench_train.resolve(bench_train.config())
    assert small == model.ModelConfig(512, 4096, 4, 4, 4, 256, "L") and (config.width, config.batch_size) == (256, 8)


@pytest.mark.parametrize(
    ("module", "settings", "ranks", "message"),
    [
        (bench_train, ["width=100"], 1, "width=100: must be a multiple of head_dim=64"),
        (bench_train, ["head_dim=0"], 1, "head_dim=0: must be at least 1"),
        (bench_train, ["what=sweep"], 2, "one node"),
        (bench_train, ["what=scaling", "ranks=2,3"], 1, "ranks=2: must divide 3"),
        (bench_train, ["what=scaling"], 2, "what=scaling runs in one process"),
        (bench_train, ["suite=gpu"], 1, "needs a CUDA device"),
        (bench_train, ["suite=gpu", "dry_run=true", "gpu.units=trian"], 1, "trian: expected some of tests, limits, tr"),
        (bench_train, ["suite=gpu"], 2, "suite=gpu runs in one process"),
        (bench_infer, ["depth=1", "prompt_tokens=500"], 1, "exceed the context"),
        (bench_infer, ["vocab_size=100"], 1, "at least 265"),
    ],
)
def test_what_cannot_run_is_rejected(module: Any, settings: list[str], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module.run(override(module.config(), settings), dataclasses.replace(HERE, world_size=ranks))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subprocesses are forks of a process that has imported torch; those of their own are in the tests above."""

    def run(command: list[str], *, seconds: float, env: Any = None, log: Path | None = None) -> _jobs.RunResult:
        count = next((int(word.partition("=")[2]) for word in command if word.startswith("--nproc_per_node=")), 1)
        if "pytest" in command:
            started = ranks.start(1, pytest.main, command[command.index("pytest") + 1 :], env=env)
        else:
            started = ranks.start_launch(count, *command[command.index(str(_jobs.ROOT / "launch.py")) + 1 :], env=env)
        with started as job:
            first, *_ = job.wait(seconds)
        if log:
            log.write_text(first.out)
        lines, failed = (first.out + first.err).splitlines(), first.code or first.value
        return _jobs.RunResult(_jobs._last_result(lines), _jobs._error_line(lines) if failed else "", lines)

    monkeypatch.setattr(_jobs, "run_subprocess", run)


@pytest.mark.slow
def test_sweep_continues_after_a_failed_configuration(forked: None, capfd: pytest.CaptureFixture[str]) -> None:
    settings = [*TINY, "what=sweep", "kernels=cudnn,sdpa", "profile=false", "dry_run=true"]
    bench_train.run(override(bench_train.config(), settings), HERE)
    out = capfd.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["kernel"] for row in rows] == ["cudnn", "sdpa"]
    assert "cudnn" in rows[0]["error"] and "tokens_per_second" not in rows[0]
    assert rows[1]["error"] is None and rows[1]["tokens_per_second"] > 0
    assert "failed: single, cudnn, fp32, False: attention=cudnn" in out


def test_sweep_has_all_combinations() -> None:
    config = bench_train.Config(modes=("zero2", "fsdp"), precisions=("fp32", "fp8"), compiles=(True, False))
    cases = bench_train.combinations(config, dataclasses.replace(HERE, world_size=2, node_ranks=2))
    assert len(cases) == 8 and {case["mode"] for case in cases} == {"zero2", "fsdp"}
    assert {case["mode"] for case in bench_train.combinations(config, HERE)} == {"single"}


@pytest.mark.slow
def test_scaling_compares_ranks(forked: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = [*TINY, "what=scaling", "ranks=1,2", "modes=zero2", "scaling=weak", f"trace={tmp_path / 'trace.json'}"]
    settings.append("dry_run=true")
    bench_train.run(override(bench_train.config(), settings), HERE)
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    one, two = result["results"]
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(two["tokens_per_second"] / 2 / one["tokens_per_second"])
    # A few bytes more than planned, of the loss and the norm.
    assert 0 <= two["sent_bytes"] - two["sent_bytes_expected"] <= 16 and "sent_bytes" not in one
    assert 0 < two["communication_exposed_share"] <= two["communication_share"] < 1


UNITS = ["tests", "limits", "train:named:bf16", "decode", "train:named:fp8", "train:auto:bf16", "members"]
UNITS += ["train:auto:fp8", "kernels"]


@pytest.mark.slow
def test_gpu_suite_dry_run_on_cpu(forked: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["suite=gpu", "dry_run=true", "gpu.tests=tests/model/test_loss.py", f"gpu.out={tmp_path}"]
    bench_train.run(override(bench_train.config(), settings), HERE)
    rows = {row["unit"]: row for row in map(json.loads, (tmp_path / "bench_gpu.jsonl").read_text().splitlines())}
    assert list(rows) == UNITS
    assert {row["error"] for row in rows.values()} == {""}
    assert "skipped" in rows["tests"]["last_lines"][-1]
    for name in UNITS:
        assert (tmp_path / f"{name.replace(':', '_')}.txt").stat().st_size
        if name.startswith("train"):
            step = rows[name]["result"]
            assert step["precision"] == ("fp8" if "fp8" in name else "fp32") and step["micro_batches"] == 2
            assert step["mfu"] > 0 and ("auto" in name or step["predicted_seconds"] > 0 < step["planned_bytes"])
            assert "auto" in name or (tmp_path / f"trace_{name.replace(':', '_')}.json.gz").stat().st_size
    assert len(rows["kernels"]["result"]["linear"]) == 4 and "batch_2" in rows["decode"]["result"]
    before, after = capfd.readouterr().out.split("== tests, at most")
    assert "time of a step by operation" in after and "not done" not in after
    assert "| train:auto:fp8 | tokens/s | " in before and "NVIDIA H100, 989 TFLOP/s in 16 bits and 3.35 TB/s" in before
    table = (tmp_path / "bench_gpu.md").read_text()
    assert table in after
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    expected = {(unit, quantity): wanted for unit, quantity, wanted, *_ in cells}
    assert expected["limits", "copy TB/s"] == "3.02" and expected["limits", "16-bit TFLOP/s"] == "791"
    without = [quantity for _, quantity, wanted, _, ratio in cells[1:] if wanted not in ("", "0") and not ratio]
    assert without == ["fp8 TFLOP/s"], "the CPU has no float8 products"


def test_gpu_suite_continues_after_a_failure_and_lists_the_rest(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        print('{"bench": "members", "step_seconds": 0.5}')  # what it has measured is kept
        raise ValueError("of a bug")

    settings = ["suite=gpu", "dry_run=true", "gpu.units=members,decode", f"gpu.out={tmp_path}", "head_dim=32"]
    monkeypatch.setattr(_members, "measure", fails)
    bench_train.run(override(bench_train.config(), settings), HERE)
    out = capfd.readouterr().out
    assert "| members | failed: ValueError: of a bug |" in out and "== decode: done" in out
    assert "| members | ms a step of all | " in out and " | 500 | " in out
    last = out.splitlines()[-1]
    assert last.startswith("not done: members; next: python launch.py --experiment=bench_train --set suite=gpu")
    assert "--set gpu.units=members" in last and "--set head_dim=32" in last and "--set dry_run=true" in last
    bench_train.run(override(bench_train.config(), [*settings, "minutes=0.4"]), HERE)
    out = capfd.readouterr().out
    assert "\nnot done: decode, members; next" in out and " | 500 | " in out, "a new start forgets the results"


def test_bench_infer_reports_every_batch_and_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["depth=1", "vocab_size=300", "sequence_len=64", "batches=1,3", "prompt_tokens=10", "new_tokens=6"]
    bench_infer.run(override(bench_infer.config(), [*settings, "rounds=1", "compile=false"]), HERE)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report) == {"bench", "settings", "limits", "prefill", "batch_1", "batch_3"}
    shape = model.from_depth(1, vocab_size=300, sequence_len=64)
    for batch in (1, 3):
        row = report[f"batch_{batch}"]
        read = model.decode_bytes(shape, batch, 13, 4)
        assert math.isclose(row["floor_seconds"], read / report["limits"]["copy_bytes_per_second"])
        assert math.isclose(row["tokens_per_second"] * row["step_seconds"], batch)
        assert row["first_token_seconds"] > 0 and row["peak_memory_bytes"] > 2**20
    assert report["prefill"]["tokens"] == 63


def test_decode_flops_and_bytes_of_a_step() -> None:
    shape = model.ModelConfig(sequence_len=512, vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    assert shape.windows == (128, 512)
    matrices = 2 * 12 * 32**2 - 2 * 2 * 32 * 16 + 12 * 2 + 24 + 64 * 32  # gates and the unembedding included
    assert model.decode_flops(shape, 200) == 2 * matrices + 4 * 32 * (128 + 200)
    assert model.decode_bytes(shape, 3, 200, 2) == 2 * (matrices + 3 * 2 * 2 * 8 * (128 + 200))


def test_core_benchmark_compares_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tokenizer.train(["the cat sat on the mat " * 9], 270), base_dir() / "bench_tokenizer_270")
    bundle = Path(__file__).parents[1] / "data" / "core_bundle"
    settings = ["what=core", f"core.bundle={bundle}", "core.vocab_size=270", "core.rows=2", "core.depth=1"]
    bench_data.run(override(bench_data.config(), [*settings, "core.sequence_len=128"]), HERE)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == "core" and result["all"]["prompts"] > 0
    assert result["all"]["ratio"] == pytest.approx(result["all"]["single"] / result["all"]["batched"])


def test_counting_cuda_kernels_needs_a_torch_that_writes_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="writes no CUDA code: install a build with CUDA, and triton"):
        _codegen.training_graphs(model.ModelConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
