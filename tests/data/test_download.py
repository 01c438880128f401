"""Downloads from a local server that misbehaves in one way per test."""

import errno
import hashlib
import os
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

import huggingface_hub.constants
import pytest

from nanochat.config import UserError
from nanochat.data import Options, download

QUICK = Options(workers=3, attempts=4, backoff_seconds=0.01)
SHARDS = 6  # five for training and one for validation


def content(index: int, size: int = 200_000) -> bytes:
    """Return bytes that look like a parquet file from outside."""
    body = bytes((i * 7 + index) % 251 for i in range(1000)) * (size // 1000)
    return b"PAR1" + body + b"PAR1"


class Handler(BaseHTTPRequestHandler):
    """Serves `content` with ranges; `server.behaviour` may take a request over by returning True."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_HEAD(self):
        self.server.heads += 1
        name = self.path.rpartition("/")[2]
        size = len(content(int(name[6:11])))
        self.send_response(200)
        sha256 = self.server.sha256 or hashlib.sha256(content(int(name[6:11]))).hexdigest()
        for key, value in {"Content-Length": str(size), "x-linked-size": str(size), "x-linked-etag": sha256}.items():
            self.send_header(key, value)
        self.end_headers()

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append((name, self.headers.get("Range")))
        self.server.counts[name] += 1
        if not (self.server.behaviour and self.server.behaviour(self, name, self.server.counts[name])):
            self.serve(content(int(name[6:11])))

    def serve(self, body: bytes, *, ranges: bool = True, headers: dict[str, str] | None = None, send: int = -1):
        """Answer with `body` or the range of it that was asked for; with `send` bytes only, then hang up."""
        asked = self.headers.get("Range") if ranges else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if asked and start >= len(body):
            self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
            return
        extra = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        part = body[start:]
        self.send_response(206 if asked else 200)
        for key, value in {"Content-Length": str(len(part)), **extra, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(part if send < 0 else part[:send])
        self.wfile.flush()
        self.close_connection = send >= 0

    def answer(self, status: int, headers: dict[str, str] | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, format: str, *args: object):
        pass


Behaviour = Callable[[Handler, str, int], bool | None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour: Behaviour | None = None
        self.requests: list[tuple[str, str | None]] = []
        self.counts: Counter[str] = Counter()
        self.heads, self.sha256 = 0, ""
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


def names(*indices: int) -> list[str]:
    return [download.shard_name(i) for i in indices]


def assert_complete(folder: Path, *indices: int):
    assert sorted(path.name for path in folder.iterdir()) == names(*indices)
    for i in indices:
        assert (folder / download.shard_name(i)).read_bytes() == content(i)


def test_downloads_the_first_shards_and_the_validation_shard_first(server: Server, tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    assert fetch(server, folder, 2) == 3
    assert_complete(folder, 0, 1, 5)
    assert server.requests[0] == ("shard_00005.parquet", None)
    server.requests.clear()
    server.heads = 0
    assert fetch(server, folder, 2) == 0
    assert server.requests == [] and server.heads == 0
    assert fetch(server, folder, -1) == 3
    assert_complete(folder, *range(6))


@pytest.mark.parametrize("num_shards", [0, -2, 6])
def test_number_of_shards_out_of_range(server: Server, tmp_path: Path, num_shards: int):
    with pytest.raises(UserError, match=f"num_shards={num_shards}: expected 1 to 5, or -1"):
        fetch(server, tmp_path, num_shards)


def test_server_errors_are_retried(server: Server, tmp_path: Path):
    server.behaviour = lambda request, name, count: request.answer(503) or True if count <= 2 else None
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    assert set(server.counts.values()) == {3}


def test_missing_file_is_not_retried_and_the_others_arrive(server: Server, tmp_path: Path):
    server.behaviour = lambda request, name, count: name[6:11] == "00003" and (request.answer(404) or True)
    with pytest.raises(UserError) as caught:
        fetch(server, tmp_path)
    message = str(caught.value)
    assert "5 of 6 shards" in message and "shard_00003.parquet: HTTP 404" in message and "\n" not in message
    assert "resume with `torchrun launch.py --experiment=data --set num_shards=-1`" in message
    assert server.counts["shard_00003.parquet"] == 1
    assert_complete(tmp_path, 0, 1, 2, 4, 5)


def test_without_a_server_only_the_validation_shard_is_tried(tmp_path: Path):
    with pytest.raises(UserError, match=r"0 of 6 shards.*shard_00005.parquet: cannot connect.*4 attempts") as caught:
        download.climbmix(tmp_path, -1, QUICK, base_url="http://127.0.0.1:9", total_shards=SHARDS)
    assert "shard_00000" not in str(caught.value)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.slow
def test_broken_connection_is_resumed(server: Server, tmp_path: Path, ranges: bool):
    def breaking(request: Handler, name: str, count: int):
        request.serve(content(int(name[6:11])), ranges=ranges, send=150_000 if count == 1 else -1)
        return True

    server.behaviour = breaking
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
    server.behaviour = lambda request, name, count: request.serve(b"<p>" + content(5)[3:]) or True
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
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(UserError, match=r"shard_00005.parquet: the disk is full; resume with"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_ctrl_c_keeps_what_has_arrived(server: Server, tmp_path: Path):
    release = threading.Event()

    def slow(request: Handler, name: str, count: int):
        if name == "shard_00000.parquet" and count == 1:
            request.serve(content(0), send=150_000)
            request.close_connection = False
            release.wait(20)
            return True

    server.behaviour = slow
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import huggingface_hub.constants as constants\n"
        "from nanochat.data import download\n"
        "from nanochat.config import UserError\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 1 << 16\n"
        "try:\n"
        f"    download.climbmix(Path(sys.argv[1]), 1, base_url={server.url!r}, total_shards={SHARDS})\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "    sys.exit(1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    part = tmp_path / "shard_00000.parquet.part"
    try:
        deadline = time.perf_counter() + 20
        while not (part.exists() and part.stat().st_size == 131_072):
            assert time.perf_counter() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=10)
    finally:
        process.kill()
        release.set()
    assert process.returncode == 1
    assert "interrupted; resume with" in output and "--experiment=data --set num_shards=1`" in output
    assert part.stat().st_size == 131_072
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    assert server.requests[-1] == ("shard_00000.parquet", "bytes=131072-")


def test_single_file_is_checked_and_resumed(server: Server, tmp_path: Path):
    path = tmp_path / "new" / "bundle.zip"
    results = iter(["not what it should be", ""])
    download.fetch(f"{server.url}/shard_00003.parquet", path, QUICK, check=lambda _: next(results))
    assert path.read_bytes() == content(3)
    assert [file.name for file in path.parent.iterdir()] == ["bundle.zip"]
    (tmp_path / "a.part").write_bytes(content(2)[:70_000])
    download.fetch(f"{server.url}/shard_00002.parquet", tmp_path / "a", QUICK)
    assert (tmp_path / "a").read_bytes() == content(2)
    assert server.requests[-1] == ("shard_00002.parquet", "bytes=70000-")


def test_single_file_that_cannot_be_downloaded(server: Server, tmp_path: Path):
    server.behaviour = lambda request, name, count: request.answer(404) or True
    with pytest.raises(UserError, match=r"shard_00001\.parquet: HTTP 404 Not Found; run the command again"):
        download.fetch(f"{server.url}/shard_00001.parquet", tmp_path / "a", QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        download.fetch(f"{server.url}/shard_00001.parquet", tmp_path / "file" / "a", QUICK)
