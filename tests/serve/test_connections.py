"""Clients that hold connections open: every wait has a timeout, and a new client is always answered."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import re
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from axrun.serve.connection import MAX_CONNECTIONS
from tests.serve.server import MODEL, Server

KEY = {"authorization": "Bearer k"}
HEAD = "Host: localhost\r\nAuthorization: Bearer k\r\nContent-Type: application/json\r\n"
COMPLETION = f"POST /v1/completions HTTP/1.1\r\n{HEAD}"
LONG = "Content-Length: 900000\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n\r\n"
HEALTH = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def request(body: dict[str, Any], version: str = "1.1") -> str:
    given = json.dumps({"model": MODEL, "temperature": 0, **body})
    return f"POST /v1/completions HTTP/{version}\r\n{HEAD}Content-Length: {len(given)}\r\n\r\n{given}"


# way: (bytes to send first, bytes to send repeatedly, expected statuses)
WAYS: dict[str, tuple[str, str, Sequence[int]]] = {
    "nothing": ("", "", [408]),
    "head": ("GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", "x", [408]),
    "blank lines": ("", "\r\n", [400]),
    "body": (COMPLETION + LONG, " ", [408]),
    "chunks": (COMPLETION + CHUNKED, "1\r\n \r\n", [408]),
    "chunk header": (COMPLETION + CHUNKED + "1;", "x", [408]),
    "trailers": (COMPLETION + CHUNKED + "2\r\n{}\r\n0\r\n", "X: x\r\n", [408]),
    "body after 100": (COMPLETION + "Expect: 100-continue\r\n" + LONG, " ", [100, 408]),
    "body is not read": ("POST /nothing HTTP/1.1\r\nHost: localhost\r\n" + LONG, "x", [404]),
    "chunks are not read": ("POST /nothing HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED, "1\r\nx\r\n", [404]),
    "refused after Expect": (
        "POST /nothing HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n" + LONG,
        "x",
        [404],
    ),
    "body of a GET": ("GET /health HTTP/1.1\r\nHost: localhost\r\n" + LONG, "x", [200]),
    "wrong method": ("DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n" + LONG, "x", [405]),
    "no key": ("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + LONG, "x", [401]),
    "no JSON": (COMPLETION.replace("json", "xml") + LONG, "x", [415]),
    "foreign host": (COMPLETION.replace("localhost", "evil.example") + LONG, "x", [403]),
    "too large": (COMPLETION + LONG.replace("9", "99"), "x", [413]),
    "too large, in chunks": (COMPLETION + CHUNKED + f"200000\r\n{' ' * (1 << 20)}", " " * 99, [413]),
    "no HTTP": ("\0\r\n\r\n", "x", [400]),
    "idle": (HEALTH, "", [200]),
    "idle, next head": (HEALTH + HEALTH, "G", [200, 200, 408]),
    "two lengths": (
        COMPLETION + "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "x",
        [400],
    ),
    "answered, not read": (request({"prompt": "Once", "max_tokens": 1, "stream": True}), "", [200]),
    "never reads": (HEALTH.replace("health", "openapi.json") * 200, "", []),
}


@pytest.fixture(scope="module")
def held(bundle_long: Path) -> Iterator[Server]:
    """A server with an API key and short timeouts."""
    server = Server(bundle_long, "--read-timeout", 1, AXRUN_API_KEY="k").ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line or "Exception" in line]


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def connect(server: Server, way: str = "") -> socket.socket:
    connection = socket.socket()
    if way == "never reads":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(60)
    connection.connect(address(server))
    return connection


def begin(server: Server, way: str) -> socket.socket:
    connection = connect(server, way)
    connection.setblocking(False)
    with contextlib.suppress(OSError):  # the send buffer is full
        connection.send(WAYS[way][0].encode())
    return connection


def newcomer(server: Server) -> None:
    """Checks that a new client gets a response."""
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    given = {"model": MODEL, "prompt": "1+1=", "max_tokens": 1, "temperature": 0}

    def ask() -> httpx.Response | None:
        response = httpx.post(f"{server.url}/v1/completions", json=given, headers=KEY, timeout=30)
        return None if response.status_code == 429 else response  # the queue is full

    assert server.until(ask).json()["choices"][0]["text"] == "2"


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", received)]


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"never reads"}))  # slow
def test_a_new_client_is_answered_while_others_hold_every_connection(held: Server, way: str) -> None:
    with contextlib.ExitStack() as stack:
        held_open = [stack.enter_context(begin(held, way)) for _ in range(MAX_CONNECTIONS + 30)]
        for _ in range(2):
            newcomer(held)
            for connection in held_open:
                with contextlib.suppress(OSError):
                    connection.send(WAYS[way][1].encode())


def test_held_connections_are_closed(held: Server) -> None:
    """The response can still be read before the close; afterwards open files and memory are as before."""
    files, rss = open_files(held), held.rss()
    with contextlib.ExitStack() as stack:
        held_open = {(way, i): stack.enter_context(begin(held, way)) for way in WAYS for i in range(8)}
        received = dict.fromkeys(held_open, b"")
        started, drips, last = time.monotonic(), set(held_open), 0.0
        while drips:
            assert time.monotonic() < started + 60, f"still open: {drips}"
            drip = time.monotonic() > last + 0.1
            last = time.monotonic() if drip else last
            for key in list(drips):
                connection, way = held_open[key], key[0]
                try:
                    if drip:
                        connection.send(WAYS[way][1].encode())
                except BlockingIOError:
                    pass
                except OSError:
                    if way == "never reads":
                        drips.discard(key)
                if way == "never reads":
                    if ended(held, connection):
                        drips.discard(key)
                    continue
                try:
                    part = connection.recv(1 << 16)
                except BlockingIOError:
                    continue
                except OSError:
                    part = b""
                received[key] += part
                if not part:
                    drips.discard(key)
            time.sleep(0.002)
    for (way, _), answer in received.items():
        assert statuses(answer) == WAYS[way][2], (way, answer)
        if WAYS[way][2] and way != "idle" and "not read" not in way:
            assert b"connection: close" in answer.lower(), way
    held.until(lambda: open_files(held) <= files)
    assert held.rss() < rss + (16 << 20)
    newcomer(held)


def ended(server: Server, connection: socket.socket) -> bool:
    """Whether the server has closed the connection, for a client that does not read."""
    port = connection.getsockname()[1]
    entries = Path("/proc/net/tcp").read_text().splitlines()[1:]
    here = int(server.url.rpartition(":")[2])
    return not any(
        fields[1].endswith(f":{here:04X}") and fields[2].endswith(f":{port:04X}") and fields[3] == "01"
        for fields in (entry.split() for entry in entries)
    )


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_an_answer_in_progress_is_not_dropped_for_a_new_client(held: Server, endless: dict[str, int]) -> None:
    given = {"prompt": "Once", "max_tokens": 3000, "logit_bias": endless, "stream": True}
    with contextlib.ExitStack() as stack:
        stream = held.client.stream("POST", "/v1/completions", json={"model": MODEL, **given}, headers=KEY)
        response = stack.enter_context(stream)
        lines = response.iter_lines()
        next(lines)
        for _ in range(MAX_CONNECTIONS + 100):
            stack.enter_context(begin(held, "head"))
        newcomer(held)
        assert [line for line in lines if line][-1] == "data: [DONE]"


def whole(server: Server, sent: str, half_close: bool = True) -> bytes:
    """All bytes from the server, for a client that half-closes the connection or not."""
    with connect(server) as connection:
        connection.sendall(sent.encode())
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65_536):
            received += part
    return received


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_half_closes_gets_its_answer(held: Server, streamed: bool, version: str) -> None:
    received = whole(held, request({"prompt": "1+1=", "max_tokens": 1, "stream": streamed}, version))
    assert statuses(received) == [200]
    assert b'"text":"2"' in received
    assert received.endswith(b"data: [DONE]\n\n" + (b"\r\n0\r\n\r\n" if version == "1.1" else b"")) or not streamed


def test_a_client_that_half_closes_gets_all_pipelined_answers(held: Server) -> None:
    first, second = (request({"prompt": prompt, "max_tokens": 1}) for prompt in ("1+1=", "2+2="))
    received = whole(held, first + HEALTH + second)
    assert statuses(received) == [200, 200, 200]
    assert received.index(b'"text":"2"') < received.index(b'"text":"4"')


def test_a_client_that_half_closes_may_wait_long(held: Server, endless: dict[str, int]) -> None:
    """The server probes it with an interim response, which clients ignore."""
    given = {"prompt": "Once", "max_tokens": 2500, "logit_bias": endless}
    with connect(held) as connection:
        connection.sendall(request(given).encode())
        connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 200
        assert json.loads(response.read())["usage"]["completion_tokens"] == 2500


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("GET /health HTTP/1.1\r\nHost: local", 400),
        (COMPLETION + "Content-Length: 9\r\n\r\n{}", 400),
        (COMPLETION + CHUNKED + "5\r\n{}", 400),
    ],
)
def test_a_half_close_in_the_middle_of_a_request_is_an_error(held: Server, sent: str, status: int) -> None:
    assert statuses(whole(held, sent)) == [status]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        # conflicting lengths: the chunked one counts, and the rest is not a request
        ("Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n" + HEALTH, [200]),
        ("Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n{chunk}0\r\n\r\n" + HEALTH, [200]),
        ("Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x" + HEALTH, [400]),
        ("Content-Length: 2, 3\r\n\r\n{}x" + HEALTH, [400]),
        ("Content-Length: +2\r\n\r\n{}" + HEALTH, [400]),
        ("Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HEALTH, [400]),
        ("Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + HEALTH, [400]),
        (
            "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"
            + HEALTH.replace("1.1\r\n", "1.1\r\nConnection: close\r\n"),
            [400, 200],
        ),
    ],
)
def test_request_smuggling_is_refused(held: Server, sent: str, expected: list[int]) -> None:
    body = json.dumps({"prompt": "1+1=", "model": MODEL, "max_tokens": 1})
    sent = sent.replace("{chunk}", f"{len(body):x}\r\n{body}\r\n")
    received = whole(held, COMPLETION + sent, half_close=False)
    assert statuses(received) == expected
    assert b"connection: close" in received.lower()


def test_random_sessions_leave_the_server_intact(held: Server) -> None:
    """Random pipelined requests, split and ended at random points: no 5xx, no leaked connections."""
    pieces = [begin + drip for begin, drip, _ in WAYS.values() if len(begin) < 2000]
    pieces += [request({"prompt": "1+1=", "max_tokens": 3, "stream": streamed}) for streamed in (True, False)]
    files, seen = open_files(held), set()

    async def session(number: int) -> None:
        chosen = random.Random(number)
        sent = "".join(chosen.choices(pieces, k=chosen.randint(1, 4))).encode()
        sent = sent[: chosen.randint(0, len(sent))] if chosen.random() < 0.5 else sent
        reader, writer = await asyncio.open_connection(*address(held))
        with contextlib.suppress(OSError):
            while sent:
                size = chosen.choice([1, 7, 100, 10_000])
                writer.write(sent[:size])
                await writer.drain()
                sent = sent[size * (1 if len(sent) < 300 else 20) :]
            end = chosen.choice(["read", "half", "close", "reset"])
            if end == "half":
                writer.write_eof()
            if end in ("read", "half"):
                seen.update(statuses(await asyncio.wait_for(reader.read(), 60)))
            if end == "reset":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async def sessions() -> None:
        for start in range(0, 400, 100):
            await asyncio.gather(*(session(start + number) for number in range(100)))

    asyncio.run(sessions())
    assert {200, 400, 404, 408} <= seen
    assert not [status for status in seen if status >= 500]
    held.until(lambda: open_files(held) <= files)
    newcomer(held)
