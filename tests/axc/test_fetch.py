"""fetch, against the real huggingface_hub client and a server of the Hub's routes on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPO, REVISION = "owner/toy", "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]
# More than the 10 MiB in which the client hands on what it has received.
WEIGHTS = random.Random(0).randbytes(24 << 20)
FILES = {"config.json": b'{"model_type": "toy"}\n', "model.safetensors": WEIGHTS}

# What `make build` does with the model, without the build.
CLIENT = """
import sys
from pathlib import Path
from axrun.errors import Failure
from axc.fetch import fetch
from axc.models import load_model
try:
    print(fetch(load_model("toy", Path(sys.argv[1])), *map(Path, sys.argv[2:])))
except Failure as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def git_blob(content: bytes) -> str:
    """As git says it, from git's own definition of a blob's id."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


@dataclass
class Hub:
    """The Hub's resolve route for one repository, with the faults a test asks for."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    cut: list[int] = field(default_factory=list)  # of the next answers to GET: bytes sent before the line goes dead
    stall: threading.Event = field(default_factory=threading.Event)  # set once a cut answer waits instead
    stalling: bool = False
    gets: list[tuple[str, str | None]] = field(default_factory=list)  # (file, Range)
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        found = re.fullmatch(rf"/{REPO}/resolve/{REVISION}/([\w.]+)", request.path)
        if found is None or found[1] not in self.files:
            request.send_response(404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        name, body = found[1], self.files[found[1]]
        wanted = request.headers.get("Range")
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0  # type: ignore[index]
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(body) - start))
        request.send_header("X-Repo-Commit", REVISION)
        pinned = FILES[name]
        tag = git_blob(pinned) if name.endswith(".json") else hashlib.sha256(pinned).hexdigest()
        request.send_header("ETag", f'"{tag}"')
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.end_headers()
        if request.command == "HEAD":
            return
        self.gets.append((name, wanted))
        end = start + self.cut.pop(0) if self.cut and name == "model.safetensors" else len(body)
        request.wfile.write(body[start:end])
        if end < len(body):
            if self.stalling:
                self.stall.set()
                time.sleep(600)  # in a daemon's thread, longer than the client lives
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


@dataclass
class Client:
    """Processes that fetch the toy model into one cache."""

    folder: Path

    def __post_init__(self) -> None:
        pins = {
            "config.json": {"size": len(FILES["config.json"]), "git_blob": git_blob(FILES["config.json"])},
            "model.safetensors": {"size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()},
        }
        tables = "".join(f"[source.files.{json.dumps(name)}]\n{_toml(pin)}\n" for name, pin in pins.items())
        build = {
            "chip": "AX650",
            "weight_type": "s8",
            "hidden_state_type": "bf16",
            "prefill_len": 8,
            "kv_cache_len": 31,
        }
        (self.folder / "toy.toml").write_text(
            f'[source]\nrepo = "{REPO}"\nrevision = "{REVISION}"\n{tables}'
            f'[build]\n{_toml(build)}\n[check]\nprompt = "1+1="\n'
        )

    @property
    def cache(self) -> Path:
        return self.folder / "hf" / "hub"

    def start(self, endpoint: str, *args: str, **more: str) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
        environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(self.folder / "hf"), **more}
        command = [sys.executable, "-c", CLIENT, str(self.folder), *args]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def fetch(self, endpoint: str, *args: str, **more: str) -> tuple[int, str, str]:
        """(exit code, stdout, the stderr from `error:` on)"""
        process = self.start(endpoint, *args, **more)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err
        return process.returncode, out.strip(), err[err.find("error:") :].strip()


def _toml(table: Mapping[str, object]) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())


@pytest.fixture
def dead_end() -> str:
    """An address where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_a_download_is_whole_and_a_second_one_needs_no_network(hub: Hub, client: Client, dead_end: str) -> None:
    code, out, err = client.fetch(hub.url)
    assert (code, err) == (0, "")
    assert {file.name: file.read_bytes() for file in Path(out).iterdir()} == FILES
    assert sorted(hub.gets) == [("config.json", None), ("model.safetensors", None)]
    assert client.fetch(dead_end) == (0, out, "")


def test_a_cut_connection_is_resumed_within_a_run(hub: Hub, client: Client) -> None:
    hub.cut = [15 << 20]
    code, out, _ = client.fetch(hub.url)
    assert code == 0
    assert (Path(out) / "model.safetensors").read_bytes() == WEIGHTS
    assert [asked for name, asked in hub.gets if name == "model.safetensors"] == [None, f"bytes={10 << 20}-"]


def test_a_killed_download_is_resumed_by_the_next_run(hub: Hub, client: Client) -> None:
    hub.cut, hub.stalling = [21 << 20], True
    process = client.start(hub.url)
    assert hub.stall.wait(300)
    deadline = time.monotonic() + 300
    while not any(part.stat().st_size >= 20 << 20 for part in client.cache.rglob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    code, out, _ = client.fetch(hub.url)
    assert code == 0
    assert (Path(out) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.gets[-1] == ("model.safetensors", f"bytes={20 << 20}-")
    assert not list(client.cache.rglob("*.incomplete"))


def test_a_corrupted_download_is_refused_and_not_kept(hub: Hub, client: Client) -> None:
    hub.files["model.safetensors"] = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    code, out, err = client.fetch(hub.url)
    assert (code, out) == (2, "")
    assert "model.safetensors is not the pinned file: it is thrown away, run again" in err
    assert f"sha256 seen     {hashlib.sha256(hub.files['model.safetensors']).hexdigest()}" in err
    assert f"sha256 expected {hashlib.sha256(WEIGHTS).hexdigest()}" in err
    assert len(err.splitlines()) == 3

    hub.files["model.safetensors"] = WEIGHTS
    code, out, _ = client.fetch(hub.url)
    assert code == 0
    assert (Path(out) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_damaged_in_the_cache_is_refused_with_its_place(hub: Hub, client: Client) -> None:
    _, out, _ = client.fetch(hub.url)
    damaged = (Path(out) / "config.json").resolve()
    damaged.write_bytes(FILES["config.json"].replace(b"toy", b"top"))
    code, _, err = client.fetch(hub.url)
    assert code == 2
    assert f"config.json is not the pinned file: remove {damaged} and run again" in err
    assert f"git blob expected {git_blob(FILES['config.json'])}" in err


def test_a_file_the_hub_does_not_have_is_named(hub: Hub, client: Client) -> None:
    del hub.files["config.json"]
    code, _, err = client.fetch(hub.url)
    assert code == 2
    assert f"config.json of {REPO} did not come from {hub.url}" in err


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network_one_error_says_both_ways(client: Client, dead_end: str, more: dict[str, str]) -> None:
    started = time.monotonic()
    code, out, err = client.fetch(dead_end, **more)
    assert time.monotonic() - started < 60
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 3
    assert "connect this machine, or name a mirror in HF_ENDPOINT" in err
    assert "make build MODEL=toy MODEL_DIR=/path/to/toy" in err


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "a copy"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_copy_is_taken_as_it_is(client: Client, copy: Path, dead_end: str) -> None:
    assert client.fetch(dead_end, str(copy)) == (0, str(copy), "")


def test_a_copy_that_lacks_files_is_told_which_and_what_it_has(client: Client, copy: Path, dead_end: str) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    code, _, err = client.fetch(dead_end, str(copy))
    assert code == 2
    assert f"{copy} lacks model.safetensors of {REPO}\nit has config.json, pytorch_model.bin" in err


def test_a_truncated_copy_is_refused_by_its_size(client: Client, copy: Path, dead_end: str) -> None:
    (copy / "model.safetensors").write_bytes(WEIGHTS[:1000])
    code, _, err = client.fetch(dead_end, str(copy))
    assert code == 2
    assert f"model.safetensors has 1000 bytes, {len(WEIGHTS)} are pinned" in err


def test_another_file_of_the_same_size_is_refused_by_its_digest(client: Client, copy: Path, dead_end: str) -> None:
    (copy / "config.json").write_bytes(FILES["config.json"][::-1])
    code, _, err = client.fetch(dead_end, str(copy))
    assert code == 2
    assert "config.json is not the pinned file" in err
    assert "axc llm_build" in err
