"""Downloads from a local server that misbehaves in one way per test."""

import dataclasses
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

import pytest

from nanochat.config import UserError
from nanochat.data import Options, download

QUICK = Options(workers=3, attempts=4, timeout_seconds=1.0, backoff_seconds=0.01)
SHARDS = 6  # five for training and one for validation


def content(index: int, size: int = 200_000) -> bytes:
    """Return bytes that look like a parquet file from outside."""
    body = bytes((i * 7 + index) % 251 for i in range(1000)) * (size // 1000)
    return b"PAR1" + body + b"PAR1"


class Handler(BaseHTTPRequestHandler):
    """Serves `content` with ranges; `server.behaviour` may take a request over by returning True."""

    protocol_version = "HTTP/1.1"
    server: "Server"

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
        self.url = f"http://127.0.0.1:{self.server_address[1]}/resolve/main"

    def handle_error(self, request: object, client_address: object):
        pass  # clients that hang up are part of the tests


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


# ---------------------------------------------------------------------------------------------------------------


def test_fetches_the_first_shards_and_always_the_last(server: Server, tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    assert fetch(server, folder, 2) == 3
    assert_complete(folder, 0, 1, 5)
    assert server.requests[0] == ("shard_00005.parquet", None)  # the one without which nothing works
    server.requests.clear()
    assert fetch(server, folder, 2) == 0
    assert server.requests == []
    assert fetch(server, folder, -1) == 3
    assert_complete(folder, *range(6))


@pytest.mark.parametrize("num_shards", [0, -2, 6])
def test_number_of_shards_out_of_range(server: Server, tmp_path: Path, num_shards: int):
    with pytest.raises(UserError, match=f"num_shards={num_shards}: expected 1 to 5, or -1"):
        fetch(server, tmp_path, num_shards)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_errors_that_pass_are_tried_again_with_growing_waits(server: Server, tmp_path: Path, status: int):
    times: list[float] = []

    def twice(request: Handler, name: str, count: int):
        times.append(time.perf_counter())
        if count <= 2:
            request.answer(status)
            return True

    server.behaviour = twice
    fetch(server, tmp_path, 1, dataclasses.replace(QUICK, workers=1, backoff_seconds=0.1))
    assert_complete(tmp_path, 0, 5)
    assert set(server.counts.values()) == {3}
    assert times[1] - times[0] >= 0.1 and times[2] - times[1] >= 0.2


def test_the_server_may_ask_for_a_longer_wait(server: Server, tmp_path: Path):
    times: list[float] = []

    def busy(request: Handler, name: str, count: int):
        times.append(time.perf_counter())
        if len(times) == 1:
            request.answer(429, {"Retry-After": "1"})
            return True

    server.behaviour = busy
    fetch(server, tmp_path, 1)
    assert times[1] - times[0] >= 1.0


def test_a_missing_file_is_not_tried_again_and_the_others_arrive(server: Server, tmp_path: Path):
    def lost(request: Handler, name: str, count: int):
        if name == "shard_00003.parquet":
            request.answer(404)
            return True

    server.behaviour = lost
    with pytest.raises(UserError) as caught:
        fetch(server, tmp_path)
    message = str(caught.value)
    assert "5 of 6 shards" in message and "shard_00003.parquet: HTTP 404" in message and "\n" not in message
    assert "`torchrun launch.py --experiment=data --set num_shards=-1`" in message
    assert server.counts["shard_00003.parquet"] == 1
    assert_complete(tmp_path, 0, 1, 2, 4, 5)
    server.behaviour = None
    assert fetch(server, tmp_path) == 1
    assert_complete(tmp_path, *range(6))


def test_without_a_server_one_file_fails_and_nothing_else_is_tried(tmp_path: Path):
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"0 of 6 shards.*shard_00005.parquet: cannot connect.*4 attempts") as caught:
        download.climbmix(tmp_path, -1, QUICK, base_url="http://127.0.0.1:9", total_shards=SHARDS)
    assert "shard_00000" not in str(caught.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off_goes_on_where_it_was(server: Server, tmp_path: Path, ranges: bool):
    def breaking(request: Handler, name: str, count: int):
        request.serve(content(int(name[6:11])), ranges=ranges, send=150_000 if count == 1 else -1)
        return True

    server.behaviour = breaking
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    second = [asked for name, asked in server.requests if name == "shard_00000.parquet"]
    assert second == [None, "bytes=131072-"]  # a server without ranges sends all of it, and that is taken


def test_a_stalled_connection_is_left_and_resumed(server: Server, tmp_path: Path):
    release = threading.Event()

    def stalling(request: Handler, name: str, count: int):
        if count == 1:
            request.serve(content(int(name[6:11])), send=150_000)
            request.close_connection = False
            release.wait(20)
            return True

    server.behaviour = stalling
    start = time.perf_counter()
    try:
        fetch(server, tmp_path, 1)
    finally:
        release.set()
    assert 2.0 <= time.perf_counter() - start < 10  # two files after each other, a second of silence each
    assert_complete(tmp_path, 0, 5)
    assert server.requests[-1] == ("shard_00000.parquet", "bytes=131072-")


def test_a_stall_that_never_ends_is_reported(server: Server, tmp_path: Path):
    release = threading.Event()
    server.behaviour = lambda request, name, count: release.wait(20)
    try:
        with pytest.raises(UserError, match=r"shard_00005.parquet: timed out \(2 attempts\)"):
            fetch(server, tmp_path, 1, dataclasses.replace(QUICK, timeout_seconds=0.2, attempts=2))
    finally:
        release.set()


def test_partial_files_of_an_earlier_run_are_continued(server: Server, tmp_path: Path):
    for index, have in [(0, 1234), (1, len(content(1))), (2, 0)]:
        (tmp_path / f"{download.shard_name(index)}.part").write_bytes(content(index)[:have])
    fetch(server, tmp_path, 3)
    assert_complete(tmp_path, 0, 1, 2, 5)
    asked = dict(server.requests)
    assert asked["shard_00000.parquet"] == "bytes=1234-"
    assert asked["shard_00001.parquet"] == f"bytes={len(content(1))}-"  # complete: answered by 416, then renamed
    assert asked["shard_00002.parquet"] is None


def test_a_partial_file_longer_than_the_file_is_dropped(server: Server, tmp_path: Path):
    (tmp_path / "shard_00000.parquet.part").write_bytes(content(0) + b"more")
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)


def redirecting(request: Handler, name: str, body: bytes, sha256: str) -> bool:
    """Answer as the hub does: a redirect that states size and checksum, then the file from elsewhere."""
    if "elsewhere" in request.path:
        request.serve(body)
    else:
        size = len(content(int(name[6:11])))
        headers = {"Location": f"/elsewhere/{name}", "x-linked-size": str(size), "x-linked-etag": f'"{sha256}"'}
        request.answer(302, headers)
    return True


def test_checksum_of_the_hub_is_verified_across_the_redirect(server: Server, tmp_path: Path):
    def hub(request: Handler, name: str, count: int):
        good = content(int(name[6:11]))
        spoilt = bytearray(good)
        spoilt[1000] ^= 1
        # Every fetch is two requests; the first fetch gets a flipped bit.
        return redirecting(request, name, bytes(spoilt) if count <= 2 else good, hashlib.sha256(good).hexdigest())

    server.behaviour = hub
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    assert all(asked is None for _, asked in server.requests)  # spoilt bytes are thrown away, not continued


def test_a_partial_file_of_another_version_is_found_by_its_checksum(server: Server, tmp_path: Path):
    server.behaviour = lambda request, name, count: redirecting(
        request, name, content(int(name[6:11])), hashlib.sha256(content(int(name[6:11]))).hexdigest()
    )
    (tmp_path / "shard_00000.parquet.part").write_bytes(b"PAR1 something else")
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)


def test_a_checksum_that_stays_wrong_leaves_no_file(server: Server, tmp_path: Path):
    server.behaviour = lambda request, name, count: redirecting(request, name, content(5), "0" * 64)
    with pytest.raises(UserError, match=r"shard_00005.parquet: wrong SHA-256 \(4 attempts\)"):
        fetch(server, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_size_of_the_hub_is_verified(server: Server, tmp_path: Path):
    server.behaviour = lambda request, name, count: redirecting(request, name, content(5)[:-500], "none")
    with pytest.raises(UserError, match=f"broke off after {len(content(5)) - 500} of {len(content(5))} bytes"):
        fetch(server, tmp_path, 1, dataclasses.replace(QUICK, attempts=1))
    assert not (tmp_path / "shard_00005.parquet").exists()


def test_a_page_in_place_of_the_file_is_refused(server: Server, tmp_path: Path):
    def portal(request: Handler, name: str, count: int):
        request.serve(b"<html>please log in</html>", ranges=False)
        return True

    server.behaviour = portal
    with pytest.raises(UserError, match="not a parquet file; does a proxy answer"):
        fetch(server, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_noticed_before(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=250_000_000))
    with pytest.raises(UserError, match=r"6 shards need about 0.6 GB, 0.2 GB are free: set a smaller num_shards"):
        fetch(server, tmp_path)
    assert server.requests == []
    assert fetch(server, tmp_path, 1) == 2


def test_a_disk_that_fills_up_stops_everything(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(UserError, match=r"shard_00005.parquet: the disk is full; go on with"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_ctrl_c_keeps_what_has_arrived_and_says_how_to_go_on(server: Server, tmp_path: Path):
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
        "from nanochat import download\n"
        "from nanochat.config import UserError\n"
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
    assert "stopped; what has arrived stays in" in output and "--experiment=data --set num_shards=1`" in output
    assert part.stat().st_size == 131_072
    fetch(server, tmp_path, 1)
    assert_complete(tmp_path, 0, 5)
    assert server.requests[-1] == ("shard_00000.parquet", "bytes=131072-")


# ---------------------------------------------------------------------------------------------------------------
# One file


def test_one_file_is_fetched_and_checked(server: Server, tmp_path: Path):
    checked = []

    def check(path: Path) -> str:
        checked.append(path.read_bytes())
        return "" if len(checked) > 1 else "not what it should be"

    path = tmp_path / "new" / "bundle.zip"
    download.fetch(f"{server.url}/shard_00003.parquet", path, QUICK, check=check)
    assert path.read_bytes() == content(3) and checked == [content(3)] * 2
    assert [name.name for name in path.parent.iterdir()] == ["bundle.zip"]


def test_one_file_goes_on_from_what_has_arrived(server: Server, tmp_path: Path):
    (tmp_path / "a.part").write_bytes(content(2)[:70_000])
    download.fetch(f"{server.url}/shard_00002.parquet", tmp_path / "a", QUICK)
    assert (tmp_path / "a").read_bytes() == content(2)
    assert server.requests == [("shard_00002.parquet", "bytes=70000-")]


def test_one_file_that_is_not_there(server: Server, tmp_path: Path):
    server.behaviour = lambda request, name, count: request.answer(404) or True
    with pytest.raises(UserError, match=r"shard_00001\.parquet: HTTP 404 Not Found; the same command"):
        download.fetch(f"{server.url}/shard_00001.parquet", tmp_path / "a", QUICK)
    with pytest.raises(UserError, match=r"cannot connect; is there a network\? \(2 attempts\)"):
        download.fetch("http://127.0.0.1:9/a", tmp_path / "a", dataclasses.replace(QUICK, attempts=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        download.fetch(f"{server.url}/shard_00001.parquet", tmp_path / "file" / "a", QUICK)
