"""Serve a trained model on the web: a page to chat on, and an API that OpenAI's clients speak.

    python launch.py --experiment=web                                  # the run that was saved last
    python launch.py --experiment=web --set run=quickstart --set port=8080
    python launch.py --experiment=web --set host=0.0.0.0 --set token_file=token.txt    # for others, with a password
    python launch.py --experiment=web --set run=quickstart_sft,lora_a,lora_b           # several models: see below

Prints the address of the page once the model is loaded. That takes seconds, and minutes when the decode step is
compiled for the first time: by default on a GPU, on a CPU with compile=true. There is one worker process for each GPU
(gpus=2 takes the first two; on a CPU there is one) and one queue for all of them.

Ctrl-C and SIGTERM stop it: requests under way have grace_seconds to end, new ones get status 503, and so does /health,
for a load balancer. What cannot end then gets an error, and the exit code is 0. A second signal stops it at once.

    curl -N localhost:8000/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")    # the token, if there is one
    client.chat.completions.create(model="nanochat", messages=[{"role": "user", "content": "Why is the sky blue?"}])
    client.completions.create(model="nanochat", prompt="The sky is blue because", max_tokens=32, logprobs=5)

EleutherAI's lm-evaluation-harness (pip install "lm_eval[api]") runs against it; with a chat model, its generative tasks
as well: --model local-chat-completions, base_url=…/v1/chat/completions and --apply_chat_template.

    lm_eval --tasks arc_easy,lambada_openai --model local-completions --model_args \
        model=nanochat,base_url=http://localhost:8000/v1/completions,tokenizer_backend=remote,max_length=2048

Of several runs, a request's `model` names the one that answers, by default the first; the page has a menu, and GET
/v1/models lists them. They may differ in size and tokenizer. Each has slots and a cache of its own on each worker, and
they take turns. Weights that are equal are held once: of adapters on one base, all that the adapters do not change.

GET /health, /stats, /metrics (Prometheus) and /openapi.json describe the server. Without host=0.0.0.0 only this machine
can reach it; conversations are not logged. Behind a proxy, name the host it is called by: --set hosts=chat.example.org.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from pathlib import Path
from typing import Annotated

from nanochat import checkpoint, distributed, jsonl, serve
from nanochat.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError


@dataclasses.dataclass(frozen=True)
class Config(checkpoint.LoadConfig):
    """A server.

    Attributes:
        run: one or more runs, each a name or the path of its folder; none: the run that was saved last. name@100: its
            step 100.
        step: of the checkpoint of a single run; none: the newest.
        host: address to listen on.
        port: port to listen on; 0: any free one.
        hosts: further names by which clients call the server, behind a proxy.
        token: bearer token that clients must send. Default: none is needed.
        token_file: file with the token, so that other users of this machine do not see it in the process list.
        slots: requests that a worker answers at once, of each model. Default: 64 on a GPU and 16 elsewhere, divided by
            the number of models.
        queue: requests that may wait for a slot, of each model; further ones get status 503.
        connections: open at once.
        requests_per_minute: of a client, by its address; further ones get status 429. Default: any number. Behind a
            proxy all clients have the proxy's address: limit the rate there.
        grace_seconds: for requests under way to end after Ctrl-C or SIGTERM. The default fits the 10 s that docker stop
            leaves; Kubernetes and torchrun leave 30, so 25 there.
        context: tokens of a conversation, answer included. Default: the model's.
        gpus: number of workers, one for each GPU. Default: all GPUs.
        compile: torch.compile the decode step. Default: on a GPU only.
        temperature, top_k, top_p, min_p, repetition_penalty: how tokens are drawn if a request does not say it.
        max_tokens: of an answer in a chat, if a request does not say it.
        model_names: further names by which requests may call the first model; "*" accepts any. Clients that were
            written for another server often send a name of their own.
        prefix_tokens: size of the prefix cache of a worker, of each model: what prompts that begin alike, such as with
            a system prompt, have in common is computed once. It takes the memory of so many tokens. Default: 4 x
            context.
        exact: always compute all slots, so that a seed gives the same answer whatever the load. Without it rounding
            depends on the load, and in rare cases the sampled token does too. Slower with few requests.
    """

    run: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: Annotated[int, "from 0 to 65535", lambda x: 0 <= x < 2**16] = 8000
    hosts: tuple[str, ...] = ()
    token: str | None = dataclasses.field(default=None, repr=False)
    token_file: Path | None = None
    slots: PositiveInt | None = None
    queue: NonNegativeInt = 256
    connections: PositiveInt = 512
    requests_per_minute: PositiveFloat | None = None
    grace_seconds: NonNegativeFloat = 8.0
    context: Annotated[int, "at least 2", lambda x: x >= 2] | None = None
    gpus: PositiveInt | None = None
    compile: bool | None = None
    prefix_tokens: NonNegativeInt | None = None
    exact: bool = False
    temperature: Annotated[float, "from 0 to 2", lambda x: 0 <= x <= 2] = 0.8
    top_k: Annotated[int, "from 0 to 200", lambda x: 0 <= x <= 200] = 50
    top_p: Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1] = 1.0
    min_p: Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1] = 0.0
    repetition_penalty: Annotated[float, "above 0, at most 2", lambda x: 0 < x <= 2] = 1.0
    max_tokens: Annotated[int, "from 1 to 4096", lambda x: 1 <= x <= 4096] = 512
    model_names: tuple[str, ...] = ("gpt-3.5-turbo", "davinci-002")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token is not None and self.token_file is not None:
            raise UserError("token and token_file are both set: use one of them")


config = Config


def run(config: Config, runtime: distributed.Runtime) -> None:
    """Load the models in a process for each device, and serve them until a signal comes."""
    distributed.require_single(runtime, "web, which starts a process for each GPU by itself,")
    models = model_sources(config)  # a wrong name is an error now, not when a process has started
    token = read_token(config)
    limits = serve.Limits(config.host, config.port, token, config.hosts, config.connections, config.grace_seconds)
    limits = dataclasses.replace(limits, requests_per_minute=config.requests_per_minute)
    is_cuda = runtime.device.type == "cuda"
    compile = is_cuda if config.compile is None else config.compile
    slots = config.slots or max(1, (64 if is_cuda else 16) // len(models))
    dtype = str(runtime.compute_dtype).removeprefix("torch.")
    workers = [
        serve.WorkerConfig(models, device, dtype, slots, config.context, compile, config.exact, config.prefix_tokens)
        for device in worker_devices(config.gpus, runtime.device.type)
    ]
    names = ", ".join(model.name for model in models)
    print(f"loading {names} on {', '.join(worker.device for worker in workers)}", flush=True)
    api = serve.ApiConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(serve.ApiConfig)})
    connects = [functools.partial(serve.worker.WorkerHandle, worker) for worker in workers]
    scheduler = serve.scheduler.create(connects, config.queue)

    def announce(port: int) -> None:
        for info in scheduler.models.values():
            print(info.about)
        for notice in filter(None, (info.notice for info in scheduler.models.values())):
            print(f"note: {notice}")
        if not limits.is_local and limits.token is None:
            print("note: whoever can reach this machine can use it; set a password: --set token_file=…")
        name = "localhost" if limits.host in ("127.0.0.1", "0.0.0.0", "::", "::1") else limits.host
        print(f"open http://{name}:{port}   (Ctrl-C stops it)", flush=True)

    serve.middleware.run(serve.app.create_app(scheduler, limits, api), scheduler, limits, announce)


def model_sources(config: Config) -> tuple[serve.ModelSource, ...]:
    """Return the models to serve, each named after its run; with the step if several steps of a run are served."""
    if config.step is not None and len(config.run) > 1:
        raise UserError(f"step={config.step} is for a single run: write run={config.run[0]}@{config.step},…")
    sources = []
    for run in config.run or (None,):
        name, step = checkpoint.split_step(run, config.step)
        sources.append((checkpoint.find_run(name), step))
    count = collections.Counter(folder.name for folder, _ in sources)
    models = []
    for folder, step in sources:
        if count[folder.name] > 1:
            step = checkpoint.inspect(folder, step).step
        name = f"{folder.name}@{step}" if count[folder.name] > 1 else folder.name
        if name in [model.name for model in models]:
            raise UserError(
                f"run={','.join(config.run)}: two models would be called {name}: rename a folder, or name it once"
            )
        models.append(serve.ModelSource(name, str(folder), step))
    return tuple(models)


def worker_devices(gpus: int | None, device_type: str) -> list[str]:
    """Return a device name for each worker."""
    import torch

    if device_type != "cuda":
        if gpus is not None and gpus > 1:
            raise UserError(f"gpus={gpus}: the model runs on the {device_type} here, in one process")
        return [device_type]
    available = torch.cuda.device_count()
    if gpus is not None and gpus > available:
        raise UserError(f"gpus={gpus}: this machine has {available}")
    return [f"cuda:{index}" for index in range(gpus or available)]


def read_token(config: Config) -> str | None:
    """Return the token that clients must send, or None."""
    token = config.token
    if config.token_file is not None:
        token = jsonl.read_text(config.token_file, f"token_file={config.token_file}").strip()
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise UserError("the token is empty or has characters that a header cannot hold: use letters and digits")
    return token
