"""Downloads from a local server that misbehaves in one way per test."""

import errno
import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub.constants
import pytest

from nanochat.config import UserError
from nanochat.data import Options, download

QUICK = Options(workers=3, attempts=4, backoff_seconds=0.01)
SHARDS = 6  # five for training and one for validation


def content(index: int) -> bytes:
    """Return 200,008 bytes that look like a parquet file from outside."""
    return b"PAR1" + bytes((i * 7 + index) % 251 for i in range(1000)) * 200 + b"PAR1"


def shard_of(path: str) -> int:
    return int(path[-13:-8])


class Handler(BaseHTTPRequestHandler):
    """Serves `content` with ranges; `server.behavior` may take a request over by returning True."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_HEAD(self):
        body = content(shard_of(self.path))
        sha256 = self.server.sha256 or hashlib.sha256(body).hexdigest()
        self.answer(200, {"Content-Length": len(body), "x-linked-size": len(body), "x-linked-etag": sha256})

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append((name, self.headers.get("Range")))
        attempt = sum(name == other for other, _ in self.server.requests)
        if not (self.server.behavior and self.server.behavior(self, name, attempt)):
            self.serve(content(shard_of(name)))

    def serve(self, body: bytes, *, ranges: bool = True, send: int = -1):
        """Answer with `body` or the requested range of it; with `send` bytes only, then hang up."""
        requested = self.headers.get("Range") if ranges else None
        start = int(requested.removeprefix("bytes=").removesuffix("-")) if requested else 0
        extra = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if requested else {}
        part = body[start:]
        self.answer(206 if requested else 200, {"Content-Length": len(part), **extra})
        self.wfile.write(part if send < 0 else part[:send])
        self.wfile.flush()
        self.close_connection = send >= 0

    def answer(self, status: int, headers: dict[str, Any]):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def fail(self, status: int) -> bool:
        self.answer(status, {"Content-Length": 0})
        return True

    def log_message(self, format: str, *args: object):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behavior: Callable[[Handler, str, int], bool | None] | None = None  # (request, file, attempt)
        self.requests: list[tuple[str, str | None]] = []
        self.sha256 = ""  # of all files, in place of the right ones
        self.url = f"http://127.0.0.1:{self.server_address[1]}/resolve/main"

    def handle_error(self, request: object, client_address: object):
        pass  # clients that hang up are part of the tests


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # 10 MB


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetch(server: Server, folder: Path, num_shards: int = -1, options: Options = QUICK) -> int:
    return download.climbmix(folder, num_shards, options, base_url=server.url, total_shards=SHARDS)


def assert_complete(folder: Path, *indices: int):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {f"shard_0000{i}.parquet": content(i) for i in indices}


def test_downloads_the_first_shards_and_the_validation_shard_first(server: Server, tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    assert fetch(server, folder, 2) == 3
    assert_complete(folder, 0, 1, 5)
    assert server.requests[0] == ("shard_00005.parquet", None)
    assert fetch(server, folder, 2) == 0 and len(server.requests) == 3
    assert fetch(server, folder, -1) == 3
    assert_complete(folder, *range(6))


def test_number_of_shards_out_of_range(server: Server, tmp_path: Path):
    for num_shards in (0, -2, 6):
        with pytest.raises(UserError, match=f"num_shards={num_shards}: expected 1 to 5, or -1"):
            fetch(server, tmp_path, num_shards)


def test_server_errors_are_retried(server: Server, tmp_path: Path):
    server.behavior = lambda request, name, attempt: request.fail(503) if attempt <= 2 else None
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    assert Counter(name for name, _ in server.requests) == {"shard_00000.parquet": 3, "shard_00005.parquet": 3}


def test_missing_file_is_not_retried_and_the_others_arrive(server: Server, tmp_path: Path):
    server.behavior = lambda request, name, attempt: shard_of(name) == 3 and request.fail(404)
    resume = "resume with `torchrun launch.py --experiment=data --set num_shards=-1`$"
    with pytest.raises(UserError, match=f"^5 of 6 shards .*shard_00003.parquet: HTTP 404 Not Found; {resume}"):
        fetch(server, tmp_path)
    assert [name for name, _ in server.requests].count("shard_00003.parquet") == 1
    assert_complete(tmp_path, 0, 1, 2, 4, 5)


def test_without_a_server_only_the_validation_shard_is_tried(tmp_path: Path):
    with pytest.raises(UserError, match=r"0 of 6 shards.*shard_00005.parquet: cannot connect.*4 attempts") as caught:
        download.climbmix(tmp_path, -1, QUICK, base_url="http://127.0.0.1:9", total_shards=SHARDS)
    assert "shard_00000" not in str(caught.value)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.slow
def test_broken_connection_is_resumed(server: Server, tmp_path: Path, ranges: bool):
    def breaking(request: Handler, name: str, attempt: int):
        request.serve(content(shard_of(name)), ranges=ranges, send=150_000 if attempt == 1 else -1)
        return True

    server.behavior = breaking
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    assert ("shard_00000.parquet", "bytes=131072-") in server.requests  # a server without ranges sends all of it


@pytest.mark.parametrize("have", [b"", content(0)[:1234], content(0), content(0) + b"more", b"PAR1 another version"])
def test_partial_file_of_an_earlier_run_is_resumed_or_replaced(server: Server, tmp_path: Path, have: bytes):
    (tmp_path / "shard_00000.parquet.part").write_bytes(have)
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    if have == content(0)[:1234]:
        assert ("shard_00000.parquet", "bytes=1234-") in server.requests


def test_corrupt_content_is_discarded(server: Server, tmp_path: Path):
    server.sha256 = "0" * 64
    with pytest.raises(UserError, match=r"shard_00005.parquet: wrong SHA-256 \(4 attempts\)"):
        fetch(server, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    server.sha256 = "unknown"
    server.behavior = lambda request, name, attempt: request.serve(b"<p>" + content(5)[3:]) or True
    with pytest.raises(UserError, match="not a parquet file; does a proxy answer"):
        fetch(server, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_disk_space_is_checked_before_the_download(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=250_000_000))
    with pytest.raises(UserError, match=r"6 shards need about 0.6 GB, 0.2 GB are free: set a smaller num_shards"):
        fetch(server, tmp_path)
    assert server.requests == []
    assert fetch(server, tmp_path, 1) == 2


def test_full_disk_stops_the_download(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download.os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=r"shard_00005.parquet: the disk is full; resume with"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_ctrl_c_keeps_what_has_arrived(server: Server, tmp_path: Path):
    release = threading.Event()

    def slow(request: Handler, name: str, attempt: int):
        if name == "shard_00000.parquet" and attempt == 1:
            request.serve(content(0), send=150_000)
            request.close_connection = False
            release.wait(20)
            return True

    server.behavior = slow
    code = f"""
import huggingface_hub.constants, pathlib
from nanochat.data import download
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
download.climbmix(pathlib.Path({str(tmp_path)!r}), 1, base_url={server.url!r}, total_shards={SHARDS})
"""
    root, part = Path(__file__).parents[2], tmp_path / "shard_00000.parquet.part"
    with subprocess.Popen([sys.executable, "-c", code], stderr=-1, text=True, cwd=root) as process:
        try:
            deadline = time.perf_counter() + 100
            while not (part.exists() and part.stat().st_size == 131_072):
                assert time.perf_counter() < deadline and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, output = process.communicate(timeout=100)
        finally:
            process.kill()
            release.set()
    assert "UserError: interrupted; resume with" in output and "--experiment=data --set num_shards=1`" in output
    assert part.stat().st_size == 131_072
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    assert server.requests[-1] == ("shard_00000.parquet", "bytes=131072-")


def test_single_file_is_checked_and_tried_again_and_a_failure_named(server: Server, tmp_path: Path):
    path = tmp_path / "new" / "bundle.zip"
    results = iter(["not what it should be", ""])
    download.fetch(f"{server.url}/shard_00003.parquet", path, QUICK, check=lambda _: next(results))
    assert path.read_bytes() == content(3)
    assert [file.name for file in path.parent.iterdir()] == ["bundle.zip"] and len(server.requests) == 2
    server.behavior = lambda request, name, attempt: request.fail(404)
    with pytest.raises(UserError, match=r"shard_00001\.parquet: HTTP 404 Not Found; run the command again"):
        download.fetch(f"{server.url}/shard_00001.parquet", tmp_path / "a", QUICK)
    with pytest.raises(UserError, match="cannot be written"):
        download.fetch(f"{server.url}/shard_00001.parquet", path / "a", QUICK)
