"""Whom the web server lets in, and for how long: tokens, origins, bodies, headers, idle and slow connections."""

import asyncio
import dataclasses
import gc
import logging
import math
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.config import UserError
from nanochat.serve import scheduler as scheduling
from nanochat.serve.scheduler import Scheduler
from nanochat.serve.schema import MAX_BODY_BYTES, ApiError, server_error
from nanochat.text import reason

PUBLIC_PATHS = ("/", "/health")  # and /static/, without a token; the page asks for it before it calls the rest
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
MAX_CLIENTS = 10_000  # whose rate is limited, before those that have been quiet are forgotten
CLOSE_SECONDS = 1.0  # at the end, for clients to read what was sent to them
SAME_SIGNAL_SECONDS = 0.3  # a signal so soon after the first is the same one: sent to the group and passed on as well

log = logging.getLogger("nanochat.serve")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Who may connect, and how slowly."""

    host: str = "127.0.0.1"  # to listen on
    port: int = 8000  # 0: any free one
    token: str | None = dataclasses.field(default=None, repr=False)  # that clients must send
    hosts: tuple[str, ...] = ()  # further names of the server, behind a proxy
    connections: int = 512  # at once
    requests_per_minute: float | None = None  # of an address
    grace_seconds: float = 8.0  # after a signal, for requests under way
    body_seconds: float = 10.0  # for a request's body to arrive
    header_seconds: float = 10.0
    send_seconds: float = 30.0  # that a client may leave sent data unread
    idle_seconds: int = 15  # between two requests of a connection

    @property
    def is_local(self) -> bool:
        """True if only this machine can connect."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body.model_dump(), error.status_code, error.headers)


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a JSON request."""
    close = {"connection": "close"}  # the rest of the body is not read
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "expected a body of content-type application/json", headers=close)
    too_large = ApiError(413, f"the body is too large: at most {MAX_BODY_BYTES:,} bytes are allowed", headers=close)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} s", headers=close) from None
    except ClientDisconnect:
        raise ApiError(408, "the client disconnected", headers=close) from None  # nobody will read this
    return bytes(content)


class RateLimiter:
    """Lets each client send so many requests a minute, all at once if it likes: GCRA, the leaky bucket of ATM."""

    def __init__(self, per_minute: float) -> None:
        self._interval_seconds = 60 / per_minute
        self._paid_until: dict[str, float] = {}  # per client, when what it has sent would be allowed if sent evenly

    def check(self, client: str) -> None:
        """Count a request; raises the refusal of one too many."""
        now = time.monotonic()
        paid_until = max(now, self._paid_until.get(client, now)) + self._interval_seconds
        wait_seconds = paid_until - now - max(60.0, self._interval_seconds)
        if wait_seconds > 0:
            message = f"too many requests from {client}: at most {60 / self._interval_seconds:g} a minute are allowed"
            retry = {"Retry-After": str(math.ceil(wait_seconds))}
            raise ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=retry)
        self._paid_until[client] = paid_until
        if len(self._paid_until) > MAX_CLIENTS:
            self._paid_until = {name: end for name, end in self._paid_until.items() if end > now}


class SecurityMiddleware:
    """ASGI middleware: refuses strangers, limits each client's rate, adds headers, counts responses."""

    def __init__(self, app: ASGIApp, limits: Limits, scheduler: Scheduler) -> None:
        self._app, self._limits, self._scheduler = app, limits, scheduler
        self._rate_limiter = RateLimiter(limits.requests_per_minute) if limits.requests_per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def send_secured(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._scheduler.metrics.responses.labels(message["status"]).inc()
                headers = MutableHeaders(scope=message)
                if self._scheduler.draining:
                    headers["connection"] = "close"
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            _check_origin(Headers(scope=scope), self._limits)
            if scope["path"] not in PUBLIC_PATHS and not scope["path"].startswith("/static/"):
                _check_token(Headers(scope=scope), self._limits)
            scheduling.CLIENT.set(client := (scope["client"] or ("unknown",))[0])
            if self._rate_limiter and scope["method"] == "POST":
                self._rate_limiter.check(client)
            await self._app(scope, receive, send_secured)
        except ApiError as error:
            await error_response(error)(scope, receive, send_secured)
        except Exception:  # whatever a route raises ends here: logged with its traceback, answered in OpenAI's form
            if started:
                raise
            log.exception("internal server error")
            error = server_error("internal server error; the server's log has the details")
            await error_response(error)(scope, receive, send_secured)


def _check_origin(headers: Headers, limits: Limits) -> None:
    # Another web page can make a browser post here, and by DNS rebinding even call this server by a name of its own.
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if limits.is_local and name not in {"localhost", "127.0.0.1", "::1", limits.host, *limits.hosts}:
        message = "this server is for its own machine: call it localhost, or allow the name (hosts)"
        raise ApiError(403, message, type="permission_error")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise ApiError(403, "requests from other web pages are refused", type="permission_error")


def _check_token(headers: Headers, limits: Limits) -> None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    is_equal = secrets.compare_digest(token.strip().encode("latin-1"), (limits.token or "").encode())
    if limits.token is not None and (scheme.lower() != "bearer" or not is_equal):
        message = "expected the header 'Authorization: Bearer <token>' with this server's token"
        challenge = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=challenge)


def protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with the limits that it lacks: slow headers, unread data, open connections."""

    class LimitedProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._timers: dict[str, asyncio.TimerHandle] = {}
            self._start_timer("header", limits.header_seconds, self.transport.abort)
            if len(self.connections) > limits.connections:
                self._refuse(503, "too many connections", "overloaded_error")

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel_timer("header")
            elif "header" not in self._timers:  # a byte now and then gains no time
                self._start_timer("header", limits.header_seconds, self.transport.abort)

        @property
        def is_busy(self) -> bool:
            """True if there is a request to answer, or an answer to send."""
            is_answering = self.cycle is not None and not self.cycle.response_complete
            return is_answering or self.transport.get_write_buffer_size() > 0

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_timer("send", limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_timer("send")

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # By then the connection is closed, or in use again, or it waits for a client that does not read.
            self._start_timer("close", limits.idle_seconds + limits.send_seconds, self._abort_if_closing)

        def _abort_if_closing(self) -> None:
            if self.transport.is_closing():
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            for name in tuple(self._timers):
                self._cancel_timer(name)
            super().connection_lost(exc)

        def _start_timer(self, name: str, seconds: float, callback: Callable[[], None]) -> None:
            self._cancel_timer(name)
            self._timers[name] = self.loop.call_later(seconds, callback)

        def _cancel_timer(self, name: str) -> None:
            if timer := self._timers.pop(name, None):
                timer.cancel()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg, "invalid_request_error")

        def _refuse(self, status: int, message: str, type: str) -> None:
            retry = {"retry-after": "1"} if status == 503 else {}
            response = error_response(ApiError(status, message, type=type, headers={"connection": "close"} | retry))
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                is_head = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
                head = h11.Response(status_code=status, headers=response.raw_headers)
                for event in (head, h11.Data(data=b"" if is_head else bytes(response.body)), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None:  # a route may be about to answer the request whose body is broken
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

    return LimitedProtocol


class Server(uvicorn.Server):
    """uvicorn's server, which drains after a signal and stops at once after a second one, or on a fatal error."""

    def __init__(
        self, app: ASGIApp, scheduler: Scheduler, limits: Limits, on_ready: Callable[[int], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
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
            )
        )
        self._scheduler, self._on_ready, self._grace_seconds = scheduler, on_ready, limits.grace_seconds
        self._signal_time: float | None = None  # of the first

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: report that the model is ready; exit if it never will be."""
        if self._on_ready and self._scheduler.ready:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])
            self._on_ready = None
        return await super().on_tick(counter) or self._scheduler.fatal_error is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain after the first signal, which counts as handled; a later one is raised again when all is closed."""
        if self._signal_time is None:
            self.should_exit, self._signal_time = True, time.monotonic()
        elif time.monotonic() - self._signal_time > SAME_SIGNAL_SECONDS:
            self._captured_signals.append(sig)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is under way for the grace period, still listening to refuse the rest; then end everything."""
        self._scheduler.draining = True
        connections: set[Any] = self.server_state.connections
        busy, seconds = {c for c in connections if c.is_busy}, self._grace_seconds
        if busy:
            log.warning("stopping; requests under way: %d, for %g s at most; again to stop at once", len(busy), seconds)
        end = time.monotonic() + seconds
        while busy and time.monotonic() < end and not self._captured_signals:
            await asyncio.sleep(0.05)
            busy = {c for c in busy if c.is_busy}
        scheduling.end_streams(self._scheduler)
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, lambda: [c.transport.abort() for c in tuple(connections)])
        await super().shutdown(sockets)


def listen(limits: Limits) -> socket.socket:
    """Return a bound socket."""
    is_ipv6 = ":" in limits.host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        return socket.create_server((limits.host, limits.port), family=family, dualstack_ipv6=is_ipv6)
    except (OSError, ValueError) as error:  # ValueError: there is no IPv6 here
        problem = f"could not listen there ({reason(error).partition(' (')[0]})"
        raise UserError(f"host={limits.host} port={limits.port}: {problem}; try another: --set port=8001") from None


def run(app: ASGIApp, scheduler: Scheduler, limits: Limits, on_ready: Callable[[int], None] | None = None) -> None:
    """Serve until a signal, or until no worker can be started; `on_ready` gets the port as soon as one is ready."""
    is_main = threading.current_thread() is threading.main_thread()
    # A second signal is raised again when all is closed: the program then has to exit cleanly too, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if is_main else None
    try:
        gc.freeze()  # collecting all that is imported takes as long as /health may, and a second at the exit
        with listen(limits) as sock:
            Server(app, scheduler, limits, on_ready).run(sockets=[sock])
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
    if scheduler.fatal_error:
        raise UserError(scheduler.fatal_error)
