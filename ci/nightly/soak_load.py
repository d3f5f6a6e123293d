"""Load generator of the soak test: concurrent users of `axrun serve` over HTTP. It records answers but judges none.

Each user has its own persistent connection; some disconnect in the middle of an answer.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ci.device import strict_json

SYSTEM = "You are a calculator on a small board. Answer with the number alone, and nothing else."
# System prompt and turns of each conversation; shared prefixes exercise the prompt cache.
CONVERSATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("1+1=", "2+2=", "17+25=")),
    (SYSTEM, ("12+30=", "7+8=")),
    (SYSTEM, ("9+4=", "40+2=")),
    ("", ("who are you?",)),
    ("", ("what can you do?", "tell me about the river")),
    ("", ("hello",)),
)
ANSWER_SECONDS = 300.0
MOST_ANSWER = 1 << 20  # bytes
CUT_EACH = 7  # one request in so many is cancelled by the client
WHOLE, CUT, LOST, REFUSED = "whole", "cut", "lost", "refused"
HTTP_OK, HTTP_BAD = 200, 400


@dataclass(frozen=True)
class Question:
    """A fixed request: its messages, and its first answer, from a fresh server, as the baseline."""

    messages: tuple[Mapping[str, str], ...]
    first: str

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Outcome:
    """The result of a request. `status` is the HTTP status, 0 without a response; `reused` the cached prompt tokens.

    `ttft` and `seconds` are the times to the first text and to the end of the answer; `why` is the error.
    """

    kind: str
    question: Question
    text: str = ""
    status: int = 0
    reused: int = 0
    ttft: float = 0.0
    seconds: float = 0.0
    why: str = ""


@dataclass
class Client:
    """One user's connection to the server."""

    port: int
    tokens: int  # of an answer, at most
    chat: bool = True  # False: the bundle has no chat template
    _link: http.client.HTTPConnection | None = field(default=None, repr=False)

    def ask(self, question: Question, cut: int = 0) -> Outcome:
        """Streams an answer; disconnects after `cut` chunks of text unless `cut` is 0."""
        started = time.monotonic()
        try:
            return self._ask(question, cut, started)
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, IndexError) as error:
            self.close()
            why = f"{type(error).__name__}: {error}"[:200]
            return Outcome(LOST, question, why=why, seconds=time.monotonic() - started)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None

    def _ask(self, question: Question, cut: int, started: float) -> Outcome:
        response = self._post(question)
        if response.status != HTTP_OK:
            said = response.read(MOST_ANSWER).decode("utf-8", "replace")
            return Outcome(REFUSED, question, status=response.status, why=_message(said))
        pieces: list[str] = []
        finished, first, reused = "", 0.0, 0
        for event in _events(response):
            if "error" in event:
                return Outcome(LOST, question, status=HTTP_OK, why=str(event["error"])[:200])
            if event.get("usage"):
                reused = int((event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            for choice in event["choices"]:
                finished = finished or str(choice.get("finish_reason") or "")
                piece = choice["delta"].get("content") if self.chat else choice.get("text")
                if piece:
                    first = first or time.monotonic() - started
                    pieces.append(str(piece))
            if cut and len(pieces) >= cut and not finished:
                self.close()
                return Outcome(CUT, question, status=HTTP_OK)
        seconds = time.monotonic() - started
        if not finished:
            return Outcome(LOST, question, status=HTTP_OK, why="the answer was truncated", seconds=seconds)
        return Outcome(WHOLE, question, "".join(pieces), HTTP_OK, reused, first or seconds, seconds)

    def _post(self, question: Question) -> http.client.HTTPResponse:
        body: dict[str, Any] = {"temperature": 0, "max_tokens": self.tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.chat:
            body["messages"] = list(question.messages)
        else:
            body["prompt"] = "\n".join(message["content"] for message in question.messages)
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        kept = self._link is not None
        self._link = self._link or http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            self._link.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            return self._link.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self.close()
            if not kept:
                raise
            return self._post(question)  # the server closed an idle connection: the request did not reach it


def questions(client: Client) -> Iterator[Outcome]:
    """Asks every question once, one after another, for the first answers. Skips questions beyond the context."""
    for system, turns in CONVERSATIONS:
        messages: list[Mapping[str, str]] = [{"role": "system", "content": system}] if system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            outcome = client.ask(Question(tuple(messages), ""))
            if outcome.status == HTTP_BAD and client.chat and "chat template" in outcome.why:
                client.chat = False
                outcome = client.ask(Question(tuple(messages), ""))
            if outcome.status == HTTP_BAD:  # longer than the context
                break
            yield outcome
            messages.append({"role": "assistant", "content": outcome.text})


def load(
    client: Callable[[], Client],
    asked: Sequence[Question],
    requests: int,
    users: int,
    seed: int,
    told: Callable[[Outcome], bool],
) -> None:
    """`users` concurrent users send `requests` questions in total, drawn with `seed`.

    `told` gets each outcome and returns whether to go on; calls are serialized. Its exceptions are re-raised here.
    """
    chosen, left = random.Random(seed), queue.SimpleQueue[tuple[Question, int]]()
    for number in range(requests):
        cut = chosen.randint(1, 3) if number % CUT_EACH == CUT_EACH - 1 else 0
        left.put((chosen.choice(asked), cut))
    lock, ended = threading.Lock(), threading.Event()
    failures: list[Exception] = []

    def user() -> None:
        mine = client()
        with contextlib.closing(mine):
            while not ended.is_set():
                try:
                    question, cut = left.get_nowait()
                except queue.Empty:
                    return
                outcome = mine.ask(question, cut)
                with lock:
                    try:
                        if not ended.is_set() and not told(outcome):
                            ended.set()
                    except Exception as error:
                        failures.append(error)
                        ended.set()

    threads = [threading.Thread(target=user, daemon=True) for _ in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def counts(port: int) -> dict[str, float]:
    """The server's /metrics: requests by status, busy slots, waiting requests. Raises OSError."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(link):
        try:
            link.request("GET", "/metrics")
            text = link.getresponse().read(MOST_ANSWER).decode("utf-8", "replace")
        except http.client.HTTPException as error:
            raise OSError(str(error)) from None
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("axrun_"):
            with contextlib.suppress(ValueError):
                found[name] = float(value)
    return found


def _events(response: http.client.HTTPResponse) -> Iterator[Mapping[str, Any]]:
    """The server-sent events of a response up to [DONE]. Raises ValueError for a malformed stream."""
    size, done = 0, False
    while line := response.readline(MOST_ANSWER + 1):
        size += len(line)
        if size > MOST_ANSWER:
            raise ValueError(f"the answer has more than {MOST_ANSWER >> 20} MB")
        data = line.strip()
        if data == b"data: [DONE]":
            done = True
        elif data.startswith(b"data: "):
            event = strict_json.loads(data[6:])
            if not isinstance(event, dict):
                raise ValueError(f"an event is {data[:60]!r}")
            yield event
    if not done:
        raise ValueError("the stream ended without [DONE]")


def _message(said: str) -> str:
    try:
        return str(strict_json.loads(said)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return said[:200]
