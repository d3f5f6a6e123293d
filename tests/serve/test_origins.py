"""CORS: only pages of allowed origins may use the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.server import Server, Start

OURS, OTHER = "https://app.example.org", "https://evil.example.org"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
ASK = {"prompt": "1+1=", "max_tokens": 1}


def test_pages_of_other_origins_are_refused_by_default(server: Server) -> None:
    for origin in (OURS, "null"):
        preflight = server.client.options("/v1/completions", headers={"origin": origin, **PREFLIGHT})
        answer = server.client.post("/v1/completions", json=ASK, headers={"origin": origin})
        assert (preflight.status_code, answer.status_code) == (405, 200)
        for response in (preflight, answer):
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_an_allowed_origin(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, "--allow-origin", OURS, "--api-key", "secret").ready()
    preflight = server.client.options("/v1/completions", headers={"origin": OURS, **PREFLIGHT})
    assert (preflight.status_code, preflight.content) == (200, b"")
    assert preflight.headers["access-control-allow-origin"] == OURS
    assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    key = {"authorization": "Bearer secret"}
    for headers, status in ((key, 200), ({}, 401)):
        answer = server.client.post("/v1/completions", json=ASK, headers={"origin": OURS, **headers})
        assert answer.status_code == status
        assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (OURS, "Origin")
    other = server.client.post("/v1/completions", json=ASK, headers={"origin": OTHER, **key})
    assert "access-control-allow-origin" not in other.headers


def test_any_origin(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, "--allow-origin", "*").ready()
    answer = server.client.post("/v1/completions", json=ASK, headers={"origin": OTHER})
    assert answer.headers["access-control-allow-origin"] == "*"
    with pytest.raises(AssertionError, match=r"--allow-origin is .example[.]org., expected"):
        start(bundle_s8, "--allow-origin", "example.org")
