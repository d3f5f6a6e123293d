"""The server process: start, shutdown, API key, overload, disconnects, metrics."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from axrun.cli import main
from axrun.errors import BadInput
from axrun.serve.server import Options
from tests.serve.server import MODEL, Server, Start, events


def data(response: httpx.Response) -> Iterator[str]:
    """The events of a stream after the first one, when a slot is busy."""
    assert response.status_code == 200
    lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
    next(lines)
    return lines


def test_the_server_restarts_after_a_kill(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8).ready()
    answer = server.complete("1+1=")["choices"]
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    again = start(bundle_s8, "--port", server.url.rpartition(":")[2]).ready()
    assert again.url == server.url
    assert again.complete("1+1=")["choices"] == answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_once(bundle_s8: Path, start: Start, number: signal.Signals) -> None:
    server = start(bundle_s8, "--grace", 3600, "--read-timeout", 3600).ready()
    assert server.client.get("/health").status_code == 200  # an idle connection does not delay the shutdown
    assert server.stop(number) == 0
    assert not any("Traceback" in line or "rror" in line for line in server.lines)


def test_json_events_report_address_and_readiness(bundle_s8: Path) -> None:
    command = [sys.executable, "-m", "axrun", "serve", str(bundle_s8), "--port", "0", "--threads", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        try:
            listening, ready = (json.loads(server.stdout.readline()) for _ in range(2))
            assert listening == {"event": "listening", "host": "127.0.0.1", "port": listening["port"]}
            assert ready == {"event": "ready", "model": MODEL}
            assert httpx.get(f"http://127.0.0.1:{listening['port']}/health", timeout=60).status_code == 200
        finally:
            server.terminate()
        assert server.wait(120) == 0
        assert server.stdout.read() == ""


def test_a_signal_while_loading_stops_it(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8)
    assert server.stop() == 0


def test_shutdown_finishes_running_requests_and_refuses_queued_ones(
    bundle_long: Path, start: Start, endless: dict[str, int]
) -> None:
    server = start(bundle_long, "--slots", 1, "--grace", 300).ready()
    whole = server.complete("Once", max_tokens=3000, logit_bias=endless)["choices"][0]["text"]
    with (
        ThreadPoolExecutor(1) as pool,
        server.stream("completions", prompt="Once", max_tokens=3000, logit_bias=endless) as begun,
    ):
        rest = data(begun)
        waiting = pool.submit(server.post, "completions", prompt="x")
        server.until(lambda: server.metrics()["axrun_requests_waiting"])
        server.process.send_signal(signal.SIGTERM)
        refused = waiting.result(60)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert "shutting down" in refused.json()["error"]["message"]
        *parts, done = rest
    assert done == "[DONE]"
    text = "".join(json.loads(part)["choices"][0]["text"] for part in parts)
    assert whole.endswith(text)
    assert len(whole) - len(text) < 20
    assert server.stop() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_requests_beyond_the_grace_period_are_cut_off(bundle_long: Path, start: Start, endless: dict[str, int]) -> None:
    server = start(bundle_long, "--grace", "0.2").ready()
    with server.stream("completions", prompt="Once", max_tokens=8000, logit_bias=endless) as begun:
        rest = data(begun)
        server.process.send_signal(signal.SIGTERM)
        *_, last = rest
    assert json.loads(last)["error"]["code"] == "service_unavailable"
    assert server.stop() == 0


def test_a_second_signal_ends_running_requests_at_once(
    bundle_long: Path, start: Start, endless: dict[str, int]
) -> None:
    server = start(bundle_long, "--grace", 3600, "--slots", 1).ready()
    body = {"prompt": "Once", "max_tokens": 8000, "logit_bias": endless}
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, "completions", **body)
        server.until(lambda: server.metrics()["axrun_slots_busy"])
        queued = pool.submit(server.post, "completions", **body)
        server.until(lambda: server.metrics()["axrun_requests_waiting"])
        for refused in (queued, running):
            server.process.send_signal(signal.SIGTERM)
            answer = refused.result(60)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            assert "shutting down" in answer.json()["error"]["message"]
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_full_queue_returns_retry_after(bundle_long: Path, start: Start, endless: dict[str, int]) -> None:
    server = start(bundle_long, "--slots", 1, "--queue", 1).ready()
    with (
        ThreadPoolExecutor(1) as pool,
        server.stream("completions", prompt="Once", max_tokens=8000, logit_bias=endless) as begun,
    ):
        _open = data(begun)
        waiting = pool.submit(server.complete, "1+1=", max_tokens=1)
        server.until(lambda: server.metrics()["axrun_requests_waiting"])
        refused = server.post("completions", prompt="x")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        begun.close()  # the next one is then served at once
        assert waiting.result(60)["choices"][0]["text"]
    assert server.idle()["axrun_cancelled_total"] == 1


@pytest.mark.parametrize("streamed", [True, False])
def test_a_disconnect_frees_the_slot_at_once(
    bundle_long: Path, server_long: Server, endless: dict[str, int], streamed: bool
) -> None:
    before = server_long.metrics()
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 8000, "logit_bias": endless, "stream": streamed})
    host, port = server_long.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        server_long.until(lambda: server_long.metrics()["axrun_slots_busy"])
        if streamed:
            connection.recv(100)
    after = server_long.idle()
    assert after["axrun_cancelled_total"] == before["axrun_cancelled_total"] + 1
    written = 'axrun_tokens_total{kind="written"}'
    assert after[written] == before[written], "generation went on to the end"


def test_two_streams_are_interleaved(server_long: Server, endless: dict[str, int]) -> None:
    """A later but shorter request finishes first."""
    cancelled = server_long.metrics()["axrun_cancelled_total"]
    with server_long.stream("completions", prompt="Once", max_tokens=8000, logit_bias=endless) as begun:
        rest = data(begun)
        later = events(server_long.post("completions", prompt="Then", max_tokens=120, logit_bias=endless, stream=True))
        assert len(later) > 100
        assert later[-1] == "[DONE]"
        server_long.until(lambda: server_long.metrics()["axrun_slots_busy"] == 1)
        assert json.loads(next(rest))["choices"][0]["text"]
    assert server_long.idle()["axrun_cancelled_total"] == cancelled + 1


def test_a_request_times_out(bundle_long: Path, start: Start, endless: dict[str, int]) -> None:
    server = start(bundle_long, "--slots", 1, "--timeout", 1).ready()
    late = server.post("completions", prompt="Once", max_tokens=8000, logit_bias=endless)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    parts = events(server.post("completions", prompt="Once", max_tokens=8000, logit_bias=endless, stream=True))
    assert parts[0]["choices"][0]["text"]
    assert parts[-1]["error"]["code"] == "timeout"
    assert server.idle()["axrun_slots_busy"] == 0
    assert server.complete("1+1=", max_tokens=1)["choices"][0]["text"] == "2"


def test_a_client_that_does_not_read_blocks_nobody(server_long: Server, endless: dict[str, int]) -> None:
    written = 'axrun_tokens_total{kind="written"}'
    before = server_long.metrics()[written]
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 500, "logit_bias": endless, "stream": True})
    host, port = server_long.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        server_long.until(lambda: server_long.metrics()[written] == before + 500)
        server_long.idle()


def test_the_api_key_is_required(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, AXRUN_API_KEY="open-sesame").ready()
    for key in (None, "", "Bearer", "Bearer open", "Basic open-sesame", "Bearer open-sesame2", "open-sesame"):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")):
            headers: dict[str, str] = {} if key is None else {"authorization": key}
            refused = server.client.request(method, path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            expected = 'Bearer realm="axrun"' + (', error="invalid_token"' if key else "")
            assert refused.headers["www-authenticate"] == expected
    for scheme in ("bearer ", "BEARER ", "Bearer   "):
        headers = {"authorization": f"{scheme}open-sesame"}
        assert server.client.get("/v1/models", headers=headers).status_code == 200
    headers = {"authorization": "Bearer open-sesame"}
    assert server.client.get("/metrics", headers=headers).status_code == 200
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/").status_code == 200


def test_health_reports_loading(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8)
    seen: list[tuple[int, str]] = []
    while not seen or seen[-1] != (200, "ok"):
        response = server.client.get("/health")
        seen.append((response.status_code, response.json()["status"]))
        if seen[-1][0] == 503 and len(seen) == 1:
            early = server.post("completions", prompt="x", max_tokens=1)
            assert early.status_code in (200, 503)
            assert early.status_code == 200 or early.headers["retry-after"]
    assert set(seen) <= {(503, "loading"), (200, "ok")}


def test_metrics_add_up(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, "--slots", 2).ready()
    first = server.complete("1+1=", max_tokens=1)["usage"]  # the run that reads the prompt gives the token
    seconds = 'axrun_step_seconds_total{{phase="{}"}}'.format
    metrics = server.until(lambda: found if (found := server.idle())[seconds("prefill")] else None)  # after the answer
    assert metrics[seconds("decode")] == 0
    used = [first, *(server.chat(text)["usage"] for text in ("1+1=", "who are you?", "who are you?"))]
    server.post("completions", prompt="")
    metrics = server.idle()
    assert metrics["axrun_slots"] == 2
    assert metrics['axrun_requests_total{path="/v1/chat/completions",status="200"}'] == 3
    assert metrics['axrun_requests_total{path="/v1/completions",status="400"}'] == 1
    assert metrics['axrun_tokens_total{kind="prompt"}'] == sum(usage["prompt_tokens"] for usage in used)
    assert metrics['axrun_tokens_total{kind="written"}'] == sum(usage["completion_tokens"] for usage in used)
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in used]
    assert metrics['axrun_tokens_total{kind="prompt_reused"}'] == sum(cached) > 0
    assert metrics["axrun_request_seconds_count"] == metrics["axrun_first_token_seconds_count"] == 4
    assert metrics['axrun_step_seconds_total{phase="decode"}'] > 0
    assert metrics["process_resident_memory_bytes"] > 1e7
    server.until(lambda: sum(line.startswith("POST /v1/chat/completions 200 ") for line in server.lines) == 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70_000}, "--port is 70000"),
        ({"port": -1}, "--port is -1"),
        ({"slots": 0}, "--slots is 0"),
        ({"kv_cache_mb": 0}, "--kv-cache-mb is 0"),
        ({"queue": 0}, "--queue is 0"),
        ({"timeout": 0.0}, "--timeout is 0.0"),
        ({"timeout": float("nan")}, "--timeout is nan"),
        ({"read_timeout": 0}, "--read-timeout is 0"),
        ({"grace": -1.0}, "--grace is -1.0"),
        ({"max_body": 0}, "--max-body is 0"),
        ({"api_key": ""}, "API key is empty"),
        ({"api_key": "sch\u00f6n"}, "characters that are not allowed in a header"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Options(**options)


def test_start_up_errors_are_short(bundle_s8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert main(["serve", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        message = err[err.index("error: ") :]
        assert message.count("\n") <= 3
        return message

    assert "no bundle folder" in refused(tmp_path / "nowhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = refused(bundle_s8, "--port", taken.getsockname()[1])
    assert "Address already in use" in message
    assert "--port" in message
    assert "cannot listen on nowhere.invalid" in refused(bundle_s8, "--host", "nowhere.invalid")
    assert "unknown engine 'tpu'" in refused(bundle_s8, "--port", 0, "--engine", "tpu")


def test_another_name_and_another_address(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, "--name", "org/my model", "--host", "0.0.0.0")
    assert any("anyone who can reach 0.0.0.0 can use this model" in line for line in server.lines)
    server.ready()
    assert server.complete("1+1=", model="org/my model", max_tokens=1)["choices"][0]["text"] == "2"
    assert server.client.get("/v1/models/org/my%20model").json()["id"] == "org/my model"
