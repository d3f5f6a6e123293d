"""Invalid requests: each gets a 4xx error in OpenAI's format, and the server keeps running."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.serve.server import MODEL, Server, Start

JSON = {"content-type": "application/json"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


HALF = "half of a surrogate pair, which is not a character."


@pytest.fixture(scope="module")
def strict(bundle_s8: Path) -> Iterator[Server]:
    """A server with a small --max-body."""
    server = Server(bundle_s8, "--max-body", 20_000, "--read-timeout", 120).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.fixture(autouse=True)
def _it_still_answers(strict: Server) -> Iterator[None]:
    yield
    assert strict.complete("1+1=", max_tokens=2)["choices"][0]["text"].startswith("2")
    strict.idle()


def refusal(response: httpx.Response, status: int, words: str) -> dict[str, Any]:
    """The error object, after checking its format and its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert words in body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2", "not JSON"),
        (b'{"model": "qwen2", "prompt": "x", "temperature": NaN}', "NaN is not a JSON number"),
        (b'{"model": "qwen2", "prompt": "x", "temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"model": "qwen2", "prompt": "\xff"}', "not UTF-8 at byte"),
        ('{"model": "qwen2", "prompt": "x"}'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b"[" * 15_000, "nested deeper than 200 levels"),
        (b'{"model": ' + b"9" * 5_000 + b"}", "A number has 5000 digits; expected at most 309."),
        (b"null", "The body is null; expected an object"),
        (b"[]", "The body is []; expected an object"),
        (b'"qwen2"', "expected an object"),
    ],
)
def test_malformed_bodies(strict: Server, body: bytes, words: str) -> None:
    refusal(strict.client.post(COMPLETIONS, content=body, headers=JSON), 400, words)


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        (CHAT, {"messages": None}, "messages", "messages is null; expected a list"),
        (CHAT, {"messages": []}, "messages", "at least 1 items"),
        (CHAT, {"messages": "hello"}, "messages", "expected a list"),
        (CHAT, {"messages": ["hello"]}, "messages[0]", "expected an object"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "Missing required parameter"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "expected one of"),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "a string, or a list of parts"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "a string, or a list of parts",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "Missing required parameter",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", HALF),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a\udfff"}}]}, "tools[0].function.name", HALF),
        (CHAT, {"chat_template_kwargs": {"a": ["\ud83d"]}}, "chat_template_kwargs.a[0]", HALF),
        (CHAT, {"messages": [{"role": "user", "content": "1+" * 400}]}, "messages", "context is 255"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        (CHAT, {"logprobs": 3}, "logprobs", "true or false"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
        (CHAT, {"max_completion_tokens": 1.5}, "max_completion_tokens", "a whole number"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "Missing required parameter"),
        (CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "expected one of"),
        (CHAT, {"messages": [{"role": "assistant", "content": 1}]}, "messages[0].content", "a string, or a list"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            "Missing required parameter",
        ),
        (CHAT, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "names 'tools'"),
        (CHAT, {"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs", "names 'a b'"),
        (CHAT, {"chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs", "names '__class__'"),
        (COMPLETIONS, {"min_p": 1.5}, "min_p", "at most 1"),
        (COMPLETIONS, {"tfs_z": 0.5}, "tfs_z", "not supported"),
        (COMPLETIONS, {"dry_base": 5}, "dry_base", "at most 4"),
        (COMPLETIONS, {"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
        (COMPLETIONS, {"ignore_eos": 1}, "ignore_eos", "true or false"),
        (CHAT, {"tools": [{}]}, "tools[0].type", "Missing required parameter"),
        (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice.function", "Missing required parameter"),
        (CHAT, {"functions": [{}]}, "functions", "not supported"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", 'expected one of "text", "json_object", '),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities[1]", "not supported"),
        (COMPLETIONS, {"prompt": []}, "prompt", "text, token ids, or a list"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "text, token ids, or a list"),
        (COMPLETIONS, {"prompt": [[1], []]}, "prompt", "text, token ids, or a list"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt", "text, token ids, or a list"),
        (COMPLETIONS, {"prompt": [1, 99_999]}, "prompt", "Token id 99999 is outside the vocabulary"),
        (COMPLETIONS, {"prompt": ["x"] * 65}, "prompt", "up to 64"),
        (COMPLETIONS, {"prompt": ["x"] * 20, "n": 4}, "n", "more than 64 answers"),
        (COMPLETIONS, {"prompt": "1+" * 400}, "prompt", "shorten it"),
        (COMPLETIONS, {"max_tokens": -2}, "max_tokens", "at least 0"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "a whole number"),
        (COMPLETIONS, {"best_of": 2}, "best_of", "not supported"),
        (COMPLETIONS, {"suffix": "x"}, "suffix", "not supported"),
        (COMPLETIONS, {"model": 7}, "model", "expected a string"),
        (COMPLETIONS, {"temperature": "hot"}, "temperature", "a number"),
        (COMPLETIONS, {"temperature": 2.1}, "temperature", "at most 2"),
        (COMPLETIONS, {"temperature": True}, "temperature", "a number"),
        (COMPLETIONS, {"top_p": -0.1}, "top_p", "at least 0"),
        (COMPLETIONS, {"top_k": -1}, "top_k", "at least 0"),
        (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
        (COMPLETIONS, {"presence_penalty": 3}, "presence_penalty", "at most 2"),
        (COMPLETIONS, {"n": 0}, "n", "at least 1"),
        (COMPLETIONS, {"seed": 1 << 64}, "seed", "at most"),
        (COMPLETIONS, {"stop": ""}, "stop", "at least 1 characters"),
        (COMPLETIONS, {"stop": ["x"] * 17}, "stop", "at most 16 items"),
        (COMPLETIONS, {"stop": [1]}, "stop[0]", "a string"),
        (COMPLETIONS, {"logit_bias": {"x": 1}}, "logit_bias.x", 'logit_bias has the key "x"; expected a token id.'),
        (COMPLETIONS, {"logit_bias": {"1" * 10: 1}}, f"logit_bias.{'1' * 10}", "expected a token id"),
        (COMPLETIONS, {"logit_bias": {"1": 1, "01": -1}}, "logit_bias.01", "expected a token id"),
        (COMPLETIONS, {"logit_bias": {"1\n": 1}}, "logit_bias.1\\n", "expected a token id"),
        (COMPLETIONS, {"stop": ["\ud800"]}, "stop[0]", HALF),
        (COMPLETIONS, {"logit_bias": {"1": 101}}, "logit_bias.1", "at most 100"),
        (COMPLETIONS, {"logit_bias": {"99999": 1}}, "logit_bias", "outside the vocabulary"),
        (COMPLETIONS, {"stream": "yes"}, "stream", "true or false"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        (COMPLETIONS, {"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "Unknown parameter"),
        (COMPLETIONS, {"prompts": "x"}, "prompts", "Unknown parameter: 'prompts'"),
        (COMPLETIONS, {"\ud800": 1}, None, HALF),
        (COMPLETIONS, {"x\ud83d\ude00": 1}, "x\\U0001f600", "Unknown parameter"),
    ],
)
def test_wrong_values(strict: Server, path: str, change: dict[str, Any], param: str | None, words: str) -> None:
    given = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
    body = json.dumps({"model": MODEL, **given, **change}).encode()
    error = refusal(strict.client.post(path, content=body, headers=JSON), 400, words)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_numbers_too_large_for_a_float(strict: Server) -> None:
    body = b'{"model": "qwen2", "prompt": "x", "temperature": 1e999}'
    refusal(strict.client.post(COMPLETIONS, content=body, headers=JSON), 400, "1e999 is too large")
    body = b'{"input": "x", "metadata": {"a": -1e999}}'  # a field that the answer repeats
    refusal(strict.client.post(RESPONSES, content=body, headers=JSON), 400, "-1e999 is too large")


@pytest.mark.parametrize("field", ["chat_template_kwargs", "metadata"])
@pytest.mark.parametrize(("opening", "closing"), [(b'{"a":', b"}"), (b"[", b"]")])
@pytest.mark.parametrize("levels", [199, 200, 400, 980])
def test_nested_bodies(strict: Server, field: str, opening: bytes, closing: bytes, levels: int) -> None:
    """Python's stack would not last for 400 levels in the chat template, and for 980 in the answer."""
    nested = opening * (levels - 2) + b"1" + closing * (levels - 2)
    body = b'{"input": "1+1=", "max_output_tokens": 1, "%s": {"a": %s}}' % (field.encode(), nested)
    response = strict.client.post(RESPONSES, content=body, headers=JSON)
    if levels <= 200:
        assert response.status_code == 200
    else:
        refusal(response, 400, "nested deeper than 200 levels")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nowhere", 404, "No such route"),
        ("GET", "/page/../server.py", 404, "No such route"),
        ("GET", "/..%2f..%2fcli.py", 404, "No such route"),
        ("POST", "/v1/audio/speech", 404, "No such route"),
        ("GET", "/v1/models/gpt-5", 404, "No such model"),
        ("GET", CHAT, 405, "accepts POST only"),
        ("OPTIONS", COMPLETIONS, 405, "accepts POST only"),
        ("DELETE", "/v1/models", 405, "accepts GET only"),
        ("POST", "/", 405, "accepts GET only"),
    ],
)
def test_unknown_routes_and_methods(strict: Server, method: str, path: str, status: int, words: str) -> None:
    response = strict.client.request(method, path)
    refusal(response, status, words)
    if status == 405:
        assert response.headers["allow"] == ("POST" if "POST" in words else "GET, HEAD")


def test_head_is_get_without_a_body(strict: Server) -> None:
    whole, head = strict.client.get("/health"), strict.client.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


def test_unknown_model(strict: Server) -> None:
    error = refusal(strict.post("completions", model="gpt-5", prompt="x"), 404, "this server has: qwen2")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_only_json_bodies_are_accepted(strict: Server) -> None:
    """Pages of other sites can send forms without permission (no CORS preflight)."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        body = json.dumps({"model": MODEL, "prompt": "x"}).encode()
        response = strict.client.post(COMPLETIONS, content=body, headers={"content-type": kind})
        refusal(response, 415, "application/json")
    fine = strict.client.post(COMPLETIONS, content=body, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert fine.status_code == 200


@pytest.mark.parametrize("size", [20_001, 300_000])
def test_too_large_bodies(strict: Server, size: int) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x"}).encode()
    refusal(strict.client.post(COMPLETIONS, content=body.ljust(size), headers=JSON), 413, "larger than 20000")
    chunks = iter([body] + [b" " * 1000] * (size // 1000))
    refusal(strict.client.post(COMPLETIONS, content=chunks, headers=JSON), 413, "larger than 20000")
    assert strict.client.post(COMPLETIONS, content=body.ljust(20_000), headers=JSON).status_code == 200


def test_an_endless_body_is_cut_off(strict: Server) -> None:
    rss = strict.rss()
    with connect(strict) as connection:
        connection.sendall(head(COMPLETIONS, 1 << 40))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(b" " * (64 << 20))
    assert strict.rss() < rss + (16 << 20)


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def answer(connection: socket.socket) -> bytes:
    """All bytes until the server closes the connection."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 100_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: nonsense\r\n\r\n",
    ],
)
def test_malformed_http(strict: Server, sent: bytes) -> None:
    with connect(strict) as connection:
        connection.sendall(sent)
        first, _, body = answer(connection).partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_slow_senders_do_not_hold_a_connection(bundle_s8: Path, start: Start) -> None:
    """Slow heads, slow bodies, silent connections, and idle keep-alive connections are closed."""
    beginnings = {
        "head": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        "body": head(COMPLETIONS, 5000),
        "silent": b"",
        "idle": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }
    server = start(bundle_s8, "--read-timeout", 2).ready()
    started = time.monotonic()
    connections = {}
    for name, beginning in beginnings.items():
        connections[name] = connect(server)
        connections[name].sendall(beginning)
        connections[name].settimeout(0.1)
    got = dict.fromkeys(connections, b"")
    ended: dict[str, float] = {}
    while len(ended) < len(connections):
        assert time.monotonic() < started + 120, f"still open: {set(connections) - set(ended)}"
        for name, connection in connections.items():
            if name in ended:
                continue
            try:
                if name in ("head", "body"):
                    with contextlib.suppress(ConnectionError):  # data sent before the reset can still be read
                        connection.sendall(b"x")
                part = connection.recv(65_536)
            except TimeoutError:
                continue
            except ConnectionError:
                part = b""
            got[name] += part
            if not part:
                ended[name] = time.monotonic() - started
        server.until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    assert b" 408 " in got["head"].splitlines()[0]
    assert b" 408 " in got["body"].splitlines()[0]
    assert b" 408 " in got["silent"].splitlines()[0]
    assert b" 200 " in got["idle"].splitlines()[0]
    assert b" 408 " not in got["idle"]
    assert all(seconds > 1.9 for seconds in ended.values()), ended
    for connection in connections.values():
        connection.close()
