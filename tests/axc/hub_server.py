"""A server on loopback with the Hub's routes, and processes that download from it with the huggingface_hub client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.axc.axc import ROOT

LFS = (".safetensors", ".bin", ".gguf")  # kept by Git LFS: known by their sha256
REPO, REVISION = "owner/toy", "0123456789abcdef0123456789abcdef01234567"
# More than the 10 MiB chunks in which the client writes a download.
WEIGHTS = random.Random(0).randbytes(24 << 20)
FILES = {"config.json": b'{"model_type": "toy"}\n', "model.safetensors": WEIGHTS}

# What `make build` does with the model, without the build.
CLIENT = """
import sys
from pathlib import Path
from axrun.errors import Failure
from axc.fetch import fetch
from axc.models import find_model, load_model
try:
    model = find_model(sys.argv[1]) if sys.argv[1][0] != "/" else load_model("toy", Path(sys.argv[1]))
    print(fetch(model, *map(Path, sys.argv[2:])))
except Failure as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def git_blob(content: bytes) -> str:
    """git's id of a blob."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


@dataclass
class Hub:
    """Two routes of the Hub for one repository, model info and files, with optional faults."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    claimed: dict[str, bytes] = field(default_factory=lambda: dict(FILES))  # what the files should be
    revision: str = REVISION  # that main is
    refusal: tuple[int, str] | None = None  # status and X-Error-Code, of the first route
    listing: bytes | None = None  # of the first route, in place of the true one
    cut: list[int] = field(default_factory=list)  # of the next answers to GET: bytes sent before the line goes dead
    stall: threading.Event = field(default_factory=threading.Event)  # set once a cut answer waits instead
    stalling: bool = False
    gets: list[tuple[str, str | None]] = field(default_factory=list)  # (file, Range)
    asked: list[str] = field(default_factory=list)  # revisions whose files were listed
    url: str = ""

    def publish(self, files: Mapping[str, bytes]) -> None:
        self.files, self.claimed = dict(files), dict(files)

    def tag(self, name: str) -> str:
        content = self.claimed[name]
        return hashlib.sha256(content).hexdigest() if name.endswith(LFS) else git_blob(content)

    def model(self) -> bytes:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": git_blob(content),
                **(
                    {"lfs": {"size": len(content), "sha256": self.tag(name), "pointerSize": 134}}
                    if name.endswith(LFS)
                    else {}
                ),
            }
            for name, content in self.claimed.items()
        ]
        return json.dumps({"id": REPO, "sha": self.revision, "siblings": siblings}).encode()

    def list_files(self, request: BaseHTTPRequestHandler, revision: str) -> None:
        self.asked.append(revision)
        status, code = self.refusal or (200, "")
        body = b"{}" if self.refusal else self.model() if self.listing is None else self.listing
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if listed := re.fullmatch(rf"/api/models/{REPO}/revision/(\w+)\?blobs=true", request.path, re.IGNORECASE):
            self.list_files(request, listed[1])
            return
        found = re.fullmatch(rf"/{REPO}/resolve/{self.revision}/([\w.-]+)", request.path)
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
        request.send_header("X-Repo-Commit", self.revision)
        request.send_header("ETag", f'"{self.tag(name)}"')
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


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
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
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


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

    def start(self, endpoint: str, *args: str, model: str = "", **more: str) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
        environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(self.folder / "hf"), **more}
        command = [sys.executable, "-c", CLIENT, model or str(self.folder), *args]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def fetch(self, endpoint: str, *args: str, model: str = "", **more: str) -> tuple[int, str, str]:
        """Fetches the toy's TOML, or a `model` of the Hub: (exit code, stdout, stderr from `error:` on)."""
        process = self.start(endpoint, *args, model=model, **more)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err
        return process.returncode, out.strip(), err[err.find("error:") :].strip()


def _toml(table: Mapping[str, object]) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
