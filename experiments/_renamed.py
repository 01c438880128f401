"""Names that were removed, with what replaces them: launch.py answers an old name with the new one."""

# old experiment -> what to type instead
EXPERIMENTS: dict[str, str] = {
    "miniseries": "--experiment=scaling_laws --set series=depths",
    "generate": "--experiment=chat --set complete=true",
    "bench_gpu": "--experiment=bench_train --set suite=gpu",
    "bench_scale": "--experiment=bench_train --set what=scaling",
    "tokenizer_eval": "--experiment=tokenizer --set eval_only=true (tokenizer is now out, max_chars eval_chars)",
    "bench_serve": "--experiment=bench_infer --set what=server",
    "bench_core": "--experiment=bench_data --set what=core",
}

# old setting -> new one; with `=`, an old value -> the new one
SETTINGS: dict[str, str] = {
    "train.grad=func": "train.grad=torch_func",
    "gpu.sections": "gpu.units",
    "gpu.linears": "gpu.units",
    "gpu.profile_depth": "profile",
    "gpu.matmul_size": "fixed for each device",
    "gpu.copy_bytes": "fixed for each device",
    "gpu.deadline": "minutes",
    "gpu.minutes": "minutes",
    "gpu.depths": "depth",
    "what=gpu": "suite=gpu",
    "sections": "gpu.units",
    "linears": "gpu.units",
    "step_tokens": "gpu.step_tokens",
    "profile_depth": "profile",
    "sweep=true": "what=sweep",
    "clients": "server.clients",
    "strong=false": "scaling=weak",
    "weak=false": "scaling=strong",
    "download.timeout_seconds": "the environment variable HF_HUB_DOWNLOAD_TIMEOUT",
    "rollout.examples": "rollout.prompts_per_step",
    "rollout.samples": "rollout.samples_per_prompt",
    "exam": "eval_task",
}
