"""Serve a trained model on the web: a page to chat on, and an API that OpenAI's clients speak.

    python launch.py --experiment=web                                  # the run that was saved last
    python launch.py --experiment=web --set run=quickstart --set port=8080
    python launch.py --experiment=web --set host=0.0.0.0 --set token_file=token.txt    # for others, with a password

Prints the address of the page once the model is loaded. That takes seconds, and minutes when the decode step is
compiled for the first time: on a GPU by itself, on a CPU with compile=true. There is one process for each GPU (gpus=2
takes the first two; on a CPU there is one) and one queue before them, and Ctrl-C ends all of it.

    curl -N localhost:8000/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")    # the token, if there is one
    client.chat.completions.create(model="nanochat", messages=[{"role": "user", "content": "Why is the sky blue?"}])

GET /health, /stats, /metrics (Prometheus) and /openapi.json describe the server. Without host=0.0.0.0 only this machine
can reach it; conversations are not logged. Behind a proxy, name the host it is called by: --set hosts=chat.example.org.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat import checkpoint, serve
from nanochat.config import UserError

if TYPE_CHECKING:
    import torch

    from nanochat.distributed import Runtime
    from nanochat.serve import Scheduler

SLOTS = {"cuda": 64}  # requests at once where they are not set; elsewhere OTHER_SLOTS
OTHER_SLOTS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """A server.

    Attributes:
        run: a run's name, or the path of its folder; none: the run that was saved last. step: none: its newest.
        host, port: to listen on. hosts: further names that the server is called by, behind a proxy.
        token: what clients have to show as a bearer token. token_file: a file with it, which other users of this
            machine cannot see in the list of processes.
        slots: requests that one replica answers at once; none: 64 on a GPU, 16 elsewhere.
        queue: requests that may wait for a slot; beyond that they are told to come back later.
        connections: at once. context: tokens of a conversation with its answer; none: the model's.
        gpus: replicas, one a GPU; none: on all of them. compile: by torch.compile; none: on a GPU.
        exact: always compute all slots, so that a seed gives the same answer to the last token whatever else is asked;
            without it the rounding of products follows the load, and rarely another token comes. Slower for few.
        device, dtype: auto, or as in `runtime.create`.
    """

    run: str | None = None
    step: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    hosts: tuple[str, ...] = ()
    token: str | None = dataclasses.field(default=None, repr=False)
    token_file: Path | None = None
    slots: int | None = None
    queue: int = 256
    connections: int = 512
    context: int | None = None
    gpus: int | None = None
    compile: bool | None = None
    exact: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, least in {"slots": 1, "queue": 0, "connections": 1, "context": 2, "gpus": 1, "port": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value}: expected a number from {least} on")


def config() -> Config:
    """Return the defaults."""
    return Config()


def run(config: Config, runtime: Runtime) -> None:
    """Load the model in a process for each device, and serve it until a signal comes."""
    if runtime.world_size > 1:
        raise UserError("web starts a process for each GPU by itself: start it with python, not torchrun")
    folder = checkpoint.find_run(config.run)  # a wrong name is an error now, not when a process has started
    limits = serve.Limits(config.host, config.port, read_token(config), config.hosts, config.connections)
    compile = runtime.device.type == "cuda" if config.compile is None else config.compile
    slots = config.slots or SLOTS.get(runtime.device.type, OTHER_SLOTS)
    dtype = str(runtime.compute_dtype).removeprefix("torch.")
    settings = [
        serve.Settings(str(folder), config.step, place, dtype, slots, config.context, compile, config.exact)
        for place in devices(config.gpus, runtime.device)
    ]
    print(f"loading {folder.name} on {', '.join(s.device for s in settings)}", flush=True)
    replicas = serve.scheduler.create([functools.partial(serve.worker.start, each) for each in settings], config.queue)
    serve.middleware.run(
        serve.app.app(replicas, limits), replicas, limits, functools.partial(announce, replicas, limits)
    )


def announce(replicas: Scheduler, limits: serve.Limits, port: int) -> None:
    """Print what is served and where."""
    assert replicas.info
    print(replicas.info.about)
    if replicas.info.notice:
        print(f"note: {replicas.info.notice}")
    if not limits.is_local and limits.token is None:
        print("note: whoever can reach this machine can use it; a password: --set token_file=…")
    name = "localhost" if limits.host in ("127.0.0.1", "0.0.0.0", "::", "::1") else limits.host
    print(f"open http://{name}:{port}   (Ctrl-C stops it)", flush=True)


def devices(gpus: int | None, device: torch.device) -> list[str]:
    """Return the devices of the replicas, as torch names them.

    Raises:
        UserError: there are not so many GPUs.
    """
    import torch

    if device.type != "cuda":
        if gpus is not None and gpus > 1:
            raise UserError(f"gpus={gpus}: the model runs on the {device.type} here, in one process")
        return [device.type]
    there = torch.cuda.device_count()
    if gpus is not None and gpus > there:
        raise UserError(f"gpus={gpus}: this machine has {there}")
    return [f"cuda:{index}" for index in range(gpus or there)]


def read_token(config: Config) -> str | None:
    """Return the token that clients have to show, or None.

    Raises:
        UserError: it cannot be read, or cannot be sent in a header.
    """
    token = config.token
    if config.token_file is not None:
        if token is not None:
            raise UserError("token and token_file are both set: leave one out")
        try:
            token = config.token_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"token_file={config.token_file}: cannot be read ({error})") from None
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise UserError("the token is empty or has characters that a header cannot hold: use letters and digits")
    return token
