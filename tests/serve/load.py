"""Load test: many clients stream answers one after another; every third client disconnects in the middle."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import numpy as np

from tests.serve.server import MODEL, Server

QUESTIONS = ("1+1=", "12+30=", "who are you?", "what can you do?", "tell me about the river", "7+8=", "hello")


@dataclass
class Figures:
    """Seconds to first token and to the complete answer; errors; number of aborted answers."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    cut: int = 0

    def summary(self) -> dict[str, float]:
        """Milliseconds, 50th and 99th percentile."""
        return {
            f"{name}_p{share}_ms": round(1e3 * float(np.percentile(values, share)), 1)
            for name, values in (("ttft", self.first), ("answer", self.whole))
            for share in (50, 99)
        }


def run(server: Server, clients: int, seconds: float, whole: int = 0, cut: int = 0) -> Figures:
    """Runs for `seconds` and until `whole` answers were complete and `cut` were aborted, however slow the machine is.

    Clients 0, 3, 6, ... disconnect. The answers of the others are compared with those of an idle server.
    """
    alone = {text: server.chat(text, max_tokens=40)["choices"][0]["message"]["content"] for text in QUESTIONS}
    figures = Figures()

    async def client(number: int, http: httpx.AsyncClient, end: float) -> None:
        chosen = random.Random(number)
        while time.monotonic() < end or len(figures.whole) < whole or figures.cut < cut:
            question = chosen.choice(QUESTIONS)
            given = {"messages": [{"role": "user", "content": question}], "max_tokens": 40, "temperature": 0}
            pieces: list[str] = []
            started = time.monotonic()
            stop_after = chosen.randint(1, 6) if number % 3 == 0 else None
            async with http.stream(
                "POST", "/v1/chat/completions", json={"model": MODEL, "stream": True, **given}
            ) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if not line or line == "data: [DONE]":
                        continue
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    if not delta.get("content"):
                        continue
                    if not pieces:
                        figures.first.append(time.monotonic() - started)
                    pieces.append(delta["content"])
                    if len(pieces) == stop_after:
                        break
                else:
                    figures.whole.append(time.monotonic() - started)
                    if "".join(pieces) != alone[question]:
                        figures.wrong.append((question, "".join(pieces)))
                    continue
            figures.cut += 1

    async def everyone() -> None:
        limits: Any = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
            end = time.monotonic() + seconds
            await asyncio.gather(*(client(number, http, end) for number in range(clients)))

    asyncio.run(everyone())
    return figures
