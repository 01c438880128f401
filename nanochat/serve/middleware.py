"""What the web server lets in, and for how long: bodies, headers, idle and slow connections, tokens, foreign pages."""

import asyncio
import base64
import dataclasses
import gc
import hashlib
import json
import logging
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.config import UserError
from nanochat.serve import scheduler, schema
from nanochat.serve.scheduler import Counters, Scheduler
from nanochat.serve.schema import ApiError

OPEN = ("/", "/health")  # without a token; the page asks for it before it calls the rest
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
log = logging.getLogger("nanochat.serve.app")

END_SECONDS = 5  # for connections to close in a shutdown


@dataclasses.dataclass(frozen=True)
class Limits:
    """Who may connect, and how slowly.

    Attributes:
        host, port: to listen on; port 0: any free one. token: that clients have to show, or None.
        hosts: names by which the server may be called besides its own, where it is behind a proxy.
        connections: at once. body_seconds: for the body of a request. header_seconds: for its header.
        send_seconds: that a client may leave what was sent unread. idle_seconds: between requests of a connection.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = dataclasses.field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    connections: int = 512
    body_seconds: float = 10.0
    header_seconds: float = 10.0
    send_seconds: float = 30.0
    idle_seconds: int = 15

    @property
    def is_local(self) -> bool:
        """True when only this machine can connect."""
        return self.host == "localhost" or (_is_address(self.host) and ip_address(self.host).is_loopback)


def refusal(error: ApiError) -> Response:
    """Return an error as a response."""
    return JSONResponse(schema.error_body(error), error.status, error.headers)


def page(html: str) -> tuple[str, str]:
    """Return the page, and a Content-Security-Policy that lets nothing run or load but what is written in it."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    rules = [
        "default-src 'none'",
        f"script-src {hashes('script')}",
        f"style-src {hashes('style')}",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html, "; ".join(rules)


async def body(request: Request, limits: Limits) -> bytes:
    """Return the body of a JSON request.

    Raises:
        ApiError: 415, not JSON; 413, too large; 408, too slow, or the client has gone.
    """
    close = {"connection": "close"}  # what is left of the body is not waited for
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "expected a body of content-type application/json", headers=close)
    large = ApiError(413, f"the body is too large: at most {schema.MAX_BODY_BYTES:,} bytes are allowed", headers=close)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > schema.MAX_BODY_BYTES:
        raise large
    found = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                found += chunk
                if len(found) > schema.MAX_BODY_BYTES:
                    raise large
    except TimeoutError:
        slow = f"the body was not there after {limits.body_seconds:g} s"
        raise ApiError(408, slow, headers=close) from None
    except ClientDisconnect:
        raise ApiError(408, "the client has gone", headers=close) from None  # nobody will read this
    return bytes(found)


class SecurityMiddleware:
    """ASGI middleware: refuses strangers, adds headers, counts responses.

    A web page of another origin can make a browser post here, and by DNS rebinding even call this server by a name of
    its own. So a request that says which page it comes from (Origin) has to come from ours, and a server that only
    this machine can reach answers only to local names (Host).
    """

    def __init__(self, app: ASGIApp, limits: Limits, counters: Counters) -> None:
        self._app, self._limits, self._counters = app, limits, counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._counters.add("responses", f'{{code="{message["status"]}"}}')
                names = {name for name, _ in message["headers"]}
                extra = {"cache-control": "no-store"} | HEADERS
                more = [(n.encode(), v.encode()) for n, v in extra.items() if n.encode() not in names]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, sent)
        except ApiError as error:
            await refusal(error)(scope, receive, sent)
        except Exception:
            if begun:
                raise
            log.exception("a mistake of ours")
            error = ApiError(500, "a mistake of the server's; its log has the details", kind="server_error")
            await refusal(error)(scope, receive, sent)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        local = {"localhost", "127.0.0.1", "::1", self._limits.host}
        if self._limits.is_local and _name(f"//{host}") not in {*local, *self._limits.hosts}:
            why = "this server is for its own machine: call it localhost, or allow the name (hosts)"
            raise ApiError(403, why, kind="permission_error")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "requests from other web pages are refused", kind="permission_error")
        if self._limits.token is None or scope["path"] in OPEN:
            return
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        right = secrets.compare_digest(token.strip().encode("latin-1"), self._limits.token.encode())
        if scheme.lower() != "bearer" or not right:
            why = "expected the header 'Authorization: Bearer <token>' with this server's token"
            raise ApiError(
                401, why, kind="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with the limits that it lacks: headers, unread answers, connections."""

    class Guarded(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _send_timer: asyncio.TimerHandle | None = None
        _end_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait_for_header()
            if len(self.connections) > limits.connections:
                self._refuse(503, "too many connections", "overloaded_error")

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._wait_for_header()
            elif self._header_timer:
                self._header_timer.cancel()
                self._header_timer = None

        def _wait_for_header(self) -> None:
            if self._header_timer is None:  # a byte now and then gains no time
                self._header_timer = self.loop.call_later(limits.header_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._send_timer = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._send_timer:
                self._send_timer.cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._end_timer:
                self._end_timer.cancel()
            # By then the connection is closed, or it is in use again and this is off.
            self._end_timer = self.loop.call_later(limits.idle_seconds + limits.send_seconds, self._abort_closing)

        def _abort_closing(self) -> None:
            if self.transport.is_closing():
                self.transport.abort()  # it waits for a client that does not read

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._header_timer, self._send_timer, self._end_timer):
                if timer:
                    timer.cancel()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg, "invalid_request_error")

        def _refuse(self, status: int, message: str, kind: str) -> None:
            content = json.dumps(schema.error_body(ApiError(status, message, kind=kind))).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(content))),
                ("connection", "close"),
                *([("retry-after", "1")] if status == 503 else []),
            ]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                events = (h11.Response(status_code=status, headers=headers), h11.Data(data=content), h11.EndOfMessage())
                for event in events:
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Guarded


class Server(uvicorn.Server):
    """uvicorn's server, which ends the streams before it waits for their connections, and ends itself without hope."""

    def __init__(
        self, app: ASGIApp, pool_: Scheduler, limits: Limits, on_ready: Callable[[int], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=limits.host,
                port=limits.port,
                http=protocol(limits),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                log_level="error",
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=END_SECONDS,
            )
        )
        self._pool, self._on_ready = pool_, on_ready

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: say that the model is there, or that it never will be."""
        if self._on_ready and self._pool.ready:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])
            self._on_ready = None
        return await super().on_tick(counter) or self._pool.hopeless is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then the connections."""
        scheduler.end_streams(self._pool, "the server is shutting down")
        await super().shutdown(sockets)


def listen(limits: Limits) -> socket.socket:
    """Return a socket that listens as asked.

    Raises:
        UserError: the port is taken, or there is no such address.
    """
    try:
        found = socket.getaddrinfo(limits.host, limits.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(found[0], socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(found[4])
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        where = f"host={limits.host} port={limits.port}"
        reason = error.strerror or str(error)
        raise UserError(f"{where}: cannot be listened on ({reason}); try another: --set port=8001") from None


def run(app: ASGIApp, pool_: Scheduler, limits: Limits, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve until a signal or until no replica can be started.

    Args:
        on_ready: called with the port when the first replica can answer.

    Raises:
        UserError: the address is taken, or the model cannot be loaded.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # uvicorn passes a signal on when all is closed: then the program has to end in order as well, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if is_main else None
    try:
        gc.freeze()  # a search for garbage through all that is imported takes as long as /health may
        with listen(limits) as sock:
            Server(app, pool_, limits, on_ready).run(sockets=[sock])
    finally:
        gc.unfreeze()
        if is_main:
            signal.signal(signal.SIGTERM, before)
    if pool_.hopeless:
        raise UserError(pool_.hopeless)
