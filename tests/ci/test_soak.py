"""Soak tests of a real `axrun serve` on loopback, and of servers with planted faults: each fault is named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import evidence, place
from ci.device.connection import Connection
from ci.device.evidence import Record
from ci.device.place import Address
from ci.device.programs import SERVER
from ci.nightly import gate, metrics, soak
from ci.nightly.soak import Sample, Soak

ROOT = Path(__file__).resolve().parents[2]
FEW = 24  # requests

# Python for the server's process, before it starts: what a request does beside, from the tenth or sixteenth on.
PLANT = """
import os
from axrun.serve import answer, app
from axrun.serve.errors import ApiError
asked, kept = [], []
write = app.App._write
async def _write(self, exchange):
    asked.append(exchange)
    if len(asked) > 10 and FAULT == "leak":
        kept.append(b"x" * (2 << 20))
    if len(asked) == 16 and FAULT == "die":
        os._exit(3)
    if len(asked) >= 16 and FAULT == "refuse":
        raise ApiError(500, "The server failed.", "internal_error")
    await write(self, exchange)
app.App._write = _write
chunk, end = answer.Answer._choice, answer.Answer.end
def _choice(self, index, body, *more):
    if len(asked) >= 16 and FAULT == "change" and body.get("delta", {}).get("content"):
        body = {"delta": {"content": "0"}}
    return chunk(self, index, body, *more)
answer.Answer._choice = _choice
answer.Answer.end = lambda self: b"" if len(asked) >= 16 and FAULT == "drop" else end(self)
if FAULT == "stay":
    from axrun.serve import server
    server.Server.handle_exit = lambda self, number, frame: None
"""


class Here(Connection):
    """This machine in place of a board: no SSH between."""

    def _shell(self) -> list[str]:
        return ["sh", "-c"]

    @contextlib.contextmanager
    def forwarded(self, port: int) -> Iterator[int]:
        yield port


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Connection]:
    board = dataclasses.replace(place.find("virtual"), state=tmp_path)
    with Here(board, Address("127.0.0.1", 1, "nobody", tmp_path / "key"), SERVER) as found:
        yield found


def command(bundle: Path, fault: str = "") -> list[str]:
    plant = f"FAULT = {fault!r}\n{PLANT}" if fault else ""
    code = (
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{plant}\nrunpy.run_module('axrun', run_name='__main__')"
    )
    return [sys.executable, "-c", code, "serve", str(bundle), "--port", "0", "--threads", "1", "--read-timeout", "60"]


def test_a_good_server_has_no_faults(link: Connection, bundle_s8: Path) -> None:
    found = soak.soak(link, command(bundle_s8), soak.SHORT)
    assert found.faults == []
    assert len(found.starts) == 2
    assert found.answers + found.cut == soak.SHORT
    assert found.cut > 0
    assert found.compared > 15
    assert found.reused_tokens > 200, "conversations go on from what is cached"
    figures = found.figures()
    assert {"soak_ttft_50", "soak_ttft_99", "soak_answer_50", "soak_answer_99", "soak_memory"} <= set(figures)
    assert set(figures) <= set(metrics.MEASURED)
    assert all(metrics.find(name).label for name in figures)
    assert 0 < figures["soak_ttft_50"] <= figures["soak_ttft_99"] <= figures["soak_answer_99"]
    assert json.loads(json.dumps(soak.report(found, link.board)))["figures"] == figures


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("leak", "axrun serve leaks memory: "),
        ("change", " answers changed: "),
        ("drop", " requests were lost; the first: "),
        ("refuse", " requests were refused; the first: 500 to "),
        ("die", "axrun serve died in life 1 after "),
        ("stay", "axrun serve did not end within 1 s of SIGTERM"),
    ],
)
def test_a_planted_fault_is_named(
    fault: str, told: str, link: Connection, bundle_s8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stay":
        monkeypatch.setattr(soak, "STOP_SECONDS", 1.0)
    monkeypatch.setattr(soak, "LONG_LIVES", 1)
    found = soak.soak(link, command(bundle_s8, fault), FEW, users=3)
    assert len(found.faults) == 1
    assert told in found.faults[0]


def test_a_server_that_does_not_start_says_why(link: Connection, tmp_path: Path) -> None:
    found = soak.soak(link, command(tmp_path / "nothing"), FEW)
    (fault,) = found.faults
    assert fault.startswith("axrun serve did not start (start 1): 'ended with exit code 2: ")


def grown(mb_each: float, requests: int, lives: int, noise: float = 0.0) -> list[Sample]:
    """A server that takes 90 MB, 15 more while it warms up, and `mb_each` for each request."""
    chance = random.Random(3)
    samples = []
    for life in range(lives):
        for done in range(1, requests // lives + 1):
            rss = 90 + 15 * min(1.0, done / (0.25 * requests / lives)) + mb_each * done + chance.gauss(0, noise)
            samples.append(Sample(life, done, round(1e6 * rss), None, None))
    return samples


@pytest.mark.parametrize(
    ("each", "requests", "lives", "noise", "leaks"),
    [
        (0.0, 40, 2, 0.0, False),
        (0.0, 40, 2, 2.0, False),
        (0.0, 1000, 6, 2.0, False),
        (0.002, 1000, 6, 0.5, False),
        (0.05, 1000, 6, 2.0, True),
        (0.5, 40, 2, 0.5, True),
    ],
)
def test_memory_is_judged_by_more_than_noise(each: float, requests: int, lives: int, noise: float, leaks: bool) -> None:
    trend = soak.slope(grown(each, requests, lives, noise))
    assert trend is not None
    assert trend.leaks == leaks
    if noise == 0:
        assert trend.slope == pytest.approx(1000 * each, abs=1e-6)


def test_cmm_that_is_not_released_is_a_fault() -> None:
    held = Soak(40, 4, cmm=[900 << 20, 900 << 20, 640 << 20])
    assert list(soak.judge(held)) == [
        "CMM is not released: 944 MB were free before the first server started, 671 MB after the last one stopped"
    ]
    assert list(soak.judge(dataclasses.replace(held, cmm=[900 << 20, 900 << 20]))) == []


def test_a_soak_needs_the_record_of_this_board(tmp_path: Path) -> None:
    board, say = place.find("virtual"), lambda line: None
    with pytest.raises(BadInput, match="no deploy is recorded in"):
        soak.on_board(board, tmp_path / "virtual.json", 40, say)
    evidence.write(tmp_path / "ax650.json", Record("ax650", "0" * 16, "1" * 16, "2" * 16, "", {}, {}))
    with pytest.raises(BadInput, match="records a deploy to ax650, but this board is virtual"):
        soak.on_board(board, tmp_path / "ax650.json", 40, say)


def test_soak_figures_with_fixed_limits_get_no_gate(tmp_path: Path) -> None:
    nights = [{"soak_memory": value, "soak_ttft_50": 30.0, "load": 1.0} for value in (0.1, -0.2, 0.3)]
    file = gate.record("ax650", "tiny-qwen2", "cpu", nights, "three nights", tmp_path)
    assert set(gate.load("ax650", "tiny-qwen2", "cpu", tmp_path)) == {"soak_ttft_50", "load"}
    assert file.is_file()
