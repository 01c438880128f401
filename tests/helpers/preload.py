"""What the server behind `ranks` imports once, so that the processes it forks start in milliseconds."""

import importlib
import pkgutil
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.tensor

import experiments
import nanochat
from nanochat.checkpoint import storage
from nanochat.distributed import runtime

for module in pkgutil.walk_packages(nanochat.__path__, "nanochat."):
    if not module.name.startswith(("nanochat.serve", "nanochat.sandbox.jail", "nanochat.sandbox.__main__")):
        importlib.import_module(module.name)
for path in Path(next(iter(experiments.__path__))).glob("[!_]*.py"):
    importlib.import_module(f"experiments.{path.stem}")
storage.orbax()
torch.set_num_threads(1)
runtime.measure_matmul = lambda *_, **__: 1e11  # it takes longer than most of the jobs
