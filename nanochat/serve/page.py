"""The chat page: its files in static/, under a policy that lets nothing else run or load, and Markdown for it."""

import asyncio
import importlib.resources
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import Field

from nanochat.serve import markdown, schema

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types nanochat"
)
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "seed")
MAX_TEXTS = 100


class RenderRequest(schema.Strict):
    """Texts in Markdown, of at most 32,000 characters in all."""

    texts: list[Annotated[str, Field(max_length=schema.MAX_CHARS)]] = Field(max_length=MAX_TEXTS)


async def settings(request: Request) -> dict[str, Any]:
    """Return the server's limits and, for each sampling parameter, its default and range."""
    properties = schema.CompletionRequest.model_json_schema()["properties"]
    defaults = vars(request.app.state.api)
    return {
        "limits": {"message": schema.MAX_MESSAGE_CHARS, "total": schema.MAX_CHARS, "messages": schema.MAX_MESSAGES},
        "sampling": {
            name: {"default": defaults.get(name)} | {key: properties[name].get(key) for key in ("minimum", "maximum")}
            for name in SAMPLING
        },
    }


async def render(body: RenderRequest) -> list[list[tuple[int, str]]]:
    """Return the blocks of each text, as `markdown.render` does."""
    if (total := sum(map(len, body.texts))) > schema.MAX_CHARS:
        message = f"texts have {total:,} characters: at most {schema.MAX_CHARS:,} in all are allowed"
        raise schema.ApiError(400, message, param="texts")
    return await asyncio.to_thread(lambda: [markdown.render(text) for text in body.texts])


def add_routes(app: FastAPI) -> None:
    """Add GET / and its files, GET /page and POST /render, which are the page's own."""
    folder = importlib.resources.files("nanochat.serve") / "static"
    for file in folder.iterdir():
        suffix = file.name.rpartition(".")[2]
        path = "/" if suffix == "html" else f"/static/{file.name}"
        _add_file(app, path, file.read_text("utf-8"), MEDIA_TYPES[suffix])
    app.get("/page", include_in_schema=False)(settings)
    app.post("/render", include_in_schema=False)(render)


def _add_file(app: FastAPI, path: str, content: str, media_type: str) -> None:
    headers: dict[str, Any] = {"content-security-policy": POLICY, "cache-control": "no-cache"}

    async def get() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    app.get(path, include_in_schema=False)(get)
    app.head(path, include_in_schema=False)(get)
