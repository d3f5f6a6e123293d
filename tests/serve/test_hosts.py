"""Allowed host names, and requests of a foreign page in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from axrun.errors import BadInput
from axrun.serve.errors import ApiError
from axrun.serve.hosts import Hosts
from axrun.serve.server import Options
from tests.serve.server import Server, Start

LOCAL = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.:1",
    "app.localhost",
    "127.0.0.1",
    "127.8.9.1:80",
    "[::1]",
    "[::1]:8000",
]
ADDRESSES = ["192.168.1.20:8000", "[fe80::1]:8000", "0.0.0.0:8000"]
PRIVATE = ["axboard", "axboard:8000", "axboard.local", "box.lan:80", "api.svc.internal", "nas.home.arpa"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "xn--bcher-kva.example",
]
MALFORMED = [
    "",
    ":8000",
    "a b",
    "http://localhost",
    "localhost/",
    "a@localhost",
    "[::1",
    "::1",
    "[1.2.3]",
    "a:b",
    "a:123456",
]


def served(hosts: Hosts, names: list[str]) -> set[int]:
    """The statuses of requests with these host names."""

    def status(name: str) -> int:
        try:
            hosts.check(name)
        except ApiError as error:
            return error.status
        return 200

    return {status(name) for name in names}


@pytest.mark.parametrize(
    ("hosts", "private", "foreign"),
    [
        (Hosts(loopback=True, key=False, own=["127.0.0.1"]), 403, 403),
        (Hosts(loopback=True, key=True, own=["127.0.0.1"]), 403, 403),
        (Hosts(loopback=False, key=False, own=["0.0.0.0"]), 200, 403),
        (Hosts(loopback=False, key=True, own=["0.0.0.0"]), 200, 200),
        (Hosts(loopback=False, key=True, own=["0.0.0.0"], allowed=["proxy.example"]), 403, 403),
        (Hosts(loopback=True, key=False, own=["127.0.0.1"], allowed=["*"]), 200, 200),
    ],
)
def test_allowed_names(hosts: Hosts, private: int, foreign: int) -> None:
    assert served(hosts, LOCAL + ADDRESSES) == {200}
    assert served(hosts, PRIVATE) == {private}
    assert served(hosts, FOREIGN) == {foreign}
    assert served(hosts, MALFORMED) == {400}


def test_own_names_and_allowed_ones() -> None:
    hosts = Hosts(loopback=False, key=False, own=["board.example"], allowed=["Proxy.example."])
    assert served(hosts, ["board.example:80", "BOARD.example", "proxy.example"]) == {200}
    assert served(hosts, ["x.board.example", "example", "axboard"]) == {403}


@pytest.mark.parametrize("name", ["http://localhost", "localhost:8000", "", "a b", "*.example"])
def test_malformed_names(name: str) -> None:
    with pytest.raises(BadInput, match="--allowed-host"):
        Options(allowed_host=[name])


def test_a_foreign_page_cannot_reach_the_server(server: Server) -> None:
    """Neither by DNS rebinding nor by a cross-origin request."""
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/nothing"), ("POST", "/v1/completions")):
        refused = server.client.request(method, path, headers={"host": "evil.example:8000"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
        assert "--allowed-host" in refused.json()["error"]["message"]
        assert server.client.request(method, path, headers={"host": "a b"}).status_code == 400
    asks = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    preflight = server.client.options("/v1/completions", headers=asks)
    simple = server.client.post("/v1/completions", content=b"{}", headers={**asks, "content-type": "text/plain"})
    assert (preflight.status_code, simple.status_code) == (405, 415)
    for response in (preflight, simple, server.client.get("/v1/models", headers=asks)):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_another_name_is_allowed(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, "--allowed-host", "axboard.example", "--allowed-host", "other")
    for host, status in (("axboard.example", 503), ("other:80", 503), ("localhost", 503), ("evil.example", 403)):
        assert server.client.get("/health", headers={"host": host}).status_code in (
            status,
            200 if status == 503 else 403,
        )
