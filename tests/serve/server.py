"""A real server for the tests: `axrun serve` in a separate process, on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx

ROOT = Path(__file__).parents[2]
MODEL = "qwen2"
T = TypeVar("T")


class Server:
    """A running server. A thread reads its standard error, so that it never blocks on a full pipe."""

    program: tuple[str, ...] = ("-m", "axrun")

    def __init__(self, bundle: Path | Sequence[Path], *flags: object, **environment: str) -> None:
        bundles = map(str, [bundle] if isinstance(bundle, Path) else bundle)
        command = [sys.executable, *self.program, "serve", *bundles, "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(
            [*command, *map(str, flags)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "board"), **environment},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r"OpenAI API Server starting on (http://\S+)")[1].replace("0.0.0.0", "127.0.0.1")
        self.client = httpx.Client(base_url=self.url, timeout=120, limits=httpx.Limits(max_connections=None))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str, seconds: float = 120.0) -> re.Match[str]:
        """The first line of standard error that matches."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.lines:
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.01)
        raise AssertionError(f"no line {pattern!r} in:\n" + "\n".join(self.lines))

    def ready(self) -> Server:
        self.wait_for("^LLM init ok")
        self.until(lambda: self.client.get("/health").status_code == 200)
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 120.0) -> int:
        """Stops the server; returns its exit code, or minus the signal that killed it. `lines` are complete then."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(seconds)
        self.client.close()
        self._reader.join(seconds)
        return code

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(f"/v1/{path}", json={"model": MODEL, **body})

    def stream(self, path: str, **body: Any) -> AbstractContextManager[httpx.Response]:
        """An open stream."""
        return self.client.stream("POST", f"/v1/{path}", json={"model": MODEL, "stream": True, **body})

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """The body of a greedy completion without streaming."""
        response = self.post("completions", prompt=prompt, **{"temperature": 0, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def chat(self, text: str, **body: Any) -> dict[str, Any]:
        """The body of a greedy chat completion without streaming."""
        messages = [{"role": "user", "content": text}]
        response = self.post("chat/completions", messages=messages, **{"temperature": 0, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def metrics(self) -> dict[str, float]:
        """Values by name, with labels."""
        lines = self.client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def idle(self, seconds: float = 60.0) -> dict[str, float]:
        """The metrics once all slots are idle. Fails if one stays busy."""

        def rests() -> dict[str, float] | None:
            metrics = self.metrics()
            return None if metrics["axrun_slots_busy"] or metrics["axrun_requests_waiting"] else metrics

        return self.until(rests, seconds)

    def until(self, condition: Callable[[], T | None], seconds: float = 60.0) -> T:
        """The result of the condition once it is true. Fails on a timeout."""
        end = time.monotonic() + seconds
        while not (given := condition()):
            assert time.monotonic() < end, "\n".join(self.lines)
            time.sleep(0.005)
        return given

    def rss(self) -> int:
        """Resident bytes. Pages that slots share count once."""
        status = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Pss:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024  # type: ignore[index]


Start = Callable[..., Server]


def events(response: httpx.Response) -> list[Any]:
    """The JSON of the server-sent events of a whole response; [DONE] as it is."""
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]
