"""The web server: its routes and its state; `chat` and `completions` answer.

This process holds no model: it checks requests, queues them (`scheduler`) and turns tokens into text. Conversations are
kept only while they are answered, and never logged.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from nanochat.serve import middleware, page, schema
from nanochat.serve import scheduler as scheduling
from nanochat.serve.api import answers, chat, completions
from nanochat.serve.api.answers import ApiConfig
from nanochat.serve.middleware import Limits
from nanochat.serve.scheduler import Scheduler
from nanochat.serve.schema import ApiError
from nanochat.serve.worker import WorkerInfo


def create_app(scheduler: Scheduler, limits: Limits, api: ApiConfig = ApiConfig()) -> FastAPI:
    """Return the application; it starts the workers and stops them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduling.start(scheduler)
        yield
        await scheduling.stop(scheduler)

    app = FastAPI(
        title="nanochat",
        version="1",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(middleware.SecurityMiddleware, limits=limits, scheduler=scheduler)],
        exception_handlers={HTTPException: _handle_error, RequestValidationError: _handle_error},
        responses={"default": {"model": schema.ErrorResponse, "description": "An error."}},
    )
    app.router.route_class = StrictJsonRoute
    app.state.scheduler, app.state.limits, app.state.api = scheduler, limits, api
    app.state.start_time = time.time()
    page.add_routes(app)
    options: Any
    for path, endpoint, options in (
        ("/health", health, {}),
        ("/stats", stats, {}),
        ("/metrics", metrics, {"response_class": PlainTextResponse}),
        ("/v1/models", models, {}),
        ("/v1/models/{name:path}", model, {}),
        ("/tokenizer_info", completions.tokenizer_info, {}),
    ):
        app.get(path, **options)(endpoint)
        app.head(path, include_in_schema=False)(endpoint)
    stream: dict[str, Any] = {"responses": {200: {"description": "The answer.", "content": {"text/event-stream": {}}}}}
    app.post("/chat/completions", response_class=StreamingResponse, **stream)(chat.chat)
    app.post("/v1/chat/completions", response_model=schema.Completion, **stream)(chat.completion)
    app.post("/v1/completions", response_model=schema.TextCompletion, **stream)(completions.completion)
    app.post("/tokenize", response_model_exclude_none=True)(completions.tokenize)
    app.post("/detokenize")(completions.detokenize)
    return app


class StrictJsonRequest(Request):
    """A request whose body is limited in size and time, and whose JSON is strict."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await middleware.read_body(self, self.app.state.limits)
        return self._body

    async def json(self) -> Any:
        return schema.decode(await self.body())


class StrictJsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict_handler(request: Request) -> Response:
            return await handler(StrictJsonRequest(request.scope, request.receive))

        return strict_handler


# State of the server


async def health(request: Request, response: Response) -> dict[str, Any]:
    """Return whether the server can answer, with status 503 while it shuts down; open to everyone."""
    scheduler: Scheduler = request.app.state.scheduler
    status = "ok" if scheduler.ready else "restarting" if scheduler.info else "loading"
    if scheduler.draining:  # a load balancer has to send new requests elsewhere
        status, response.status_code = "draining", 503
    workers = [{"gpu": index, "ready": bool(worker.info)} for index, worker in enumerate(scheduler.workers)]
    notice = scheduler.info.notice if scheduler.info else None
    ready = scheduler.ready and not scheduler.draining
    return {"status": status, "ready": ready, "workers": workers, "notice": notice}


async def stats(request: Request) -> dict[str, Any]:
    """Return the models, the load and the workers."""
    scheduler: Scheduler = request.app.state.scheduler
    info, counts = scheduler.info, scheduler.metrics
    answers = {finish: int(counts.value("answers_total", finish=finish)) for finish in scheduling.FINISHES}
    workers = [
        {
            "gpu": index,
            "device": worker.info.device if worker.info else None,
            "ready": bool(worker.info),
            "slots": sum(info.slots for info in worker.models.values()),
            "active": len(worker.streams),
            "restarts": worker.restarts,
            "error": worker.error,
        }
        for index, worker in enumerate(scheduler.workers)
    ]
    models = []
    for name, model in scheduler.models.items():
        waiting, active = scheduler.load_of(name)
        load = {"waiting": waiting, "active": active, "tokens": int(counts.value("model_tokens_total", model=name))}
        models.append(_about(model) | {"notice": model.notice} | load)
    return {
        "model": info and _about(info),
        "models": models,
        "notice": info.notice if info else None,
        "uptime_seconds": round(time.time() - request.app.state.start_time, 1),
        "queue": {"length": len(scheduler.queue), "limit": scheduler.queue_limit},
        "active": scheduler.active,
        "workers": workers,
        "answers": {finish: n for finish, n in answers.items() if n},
        "tokens": int(counts.value("tokens_total")),
        "defaults": {name: value for name, value in vars(request.app.state.api).items() if name != "model_names"},
    }


async def metrics(request: Request) -> PlainTextResponse:
    """Return metrics in the format of Prometheus."""
    content = prometheus_client.generate_latest(request.app.state.scheduler.metrics.registry)
    return PlainTextResponse(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def models(request: Request) -> dict[str, Any]:
    """Return the models, as OpenAI's list."""
    loaded = request.app.state.scheduler.models.values()
    return {"object": "list", "data": [_describe(request, info) for info in loaded]}


async def model(request: Request, name: str) -> dict[str, Any]:
    """Return the model with this name."""
    return _describe(request, answers.ready_model(request.app.state.scheduler, request.app.state.api, name))


def _about(info: WorkerInfo) -> dict[str, Any]:
    return {"name": info.name, "step": info.step, "stage": info.stage, "context": info.context}


def _describe(request: Request, info: WorkerInfo) -> dict[str, Any]:
    fields = {"id": info.name, "object": "model", "created": int(request.app.state.start_time)}
    return fields | {"owned_by": "nanochat", "max_model_len": info.context}


async def _handle_error(request: Request, error: Any) -> Response:
    if isinstance(error, RequestValidationError):
        error = schema.validation_error(error.errors())
    elif not isinstance(error, ApiError):  # the router's
        path = request.url.path
        message = f"{path} has no method {request.method}" if error.status_code == 405 else f"there is no {path}"
        error = ApiError(error.status_code, message, headers=error.headers)
    return middleware.error_response(error)
