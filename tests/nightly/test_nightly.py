"""Green nights, and red nights with planted causes, which the first line must name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from axrun.format.bundle import sha256
from ci.device import place, virtual_board
from ci.nightly import history
from tests.ci import plants
from tests.nightly.conftest import ROOT, Desk, Night, commands, on_board

pytestmark = pytest.mark.system

RED, GREEN = "red: tiny-qwen2 on virtual (emulated): ", "green: tiny-qwen2 on virtual (emulated): "
HANDED_IN = "red: tiny-qwen2 (bundle handed in) on virtual (emulated): "
LOST = r"deploy: (virtual was lost|virtual did not answer|board@.* cannot be reached|rsync to virtual).*"
# A planted slowdown: in `axrun bench`, the engine runs everything twice.
SLOW_DOWN = """

import sys as _sys
if "bench" in _sys.argv:
    _run = AxBinding.run
    AxBinding.run = lambda self: [_run(self) for _ in range(2)] and None
"""


def test_a_night_is_green(desk: Desk) -> None:
    night = desk.start()
    code, said = night.end()
    assert re.fullmatch(re.escape(GREEN) + r"\d+ figures within their gates", said[0])
    assert code == 0
    assert desk.left(night) == []

    (held,) = history.read(desk.history, "virtual", "tiny-qwen2").nights
    assert (held.verdict, held.reason, held.maker) == ("green", "", "cpu")
    assert held.figures["top1_agreement"] > 99
    assert {"mean_kld", "cache_kld", "decode_128", "work", "ttft_128"} <= set(held.figures)
    assert set(held.gates) <= set(held.figures)
    assert "layer 0 prefill" in held.layers
    assert held.machine["system"] == "Linux aarch64"
    folder = desk.newest()
    cases = list(ElementTree.parse(folder / "junit.xml").iter("testcase"))
    assert len(cases) == 8
    told = json.loads((folder / "figures.json").read_text())["one_answer"]
    assert told["compared"]
    assert told["here"] == told["board"]
    assert not [case for case in cases if len(case.findall("*")) > len(case.findall("properties"))]
    marks = {entry["name"]: entry for entry in json.loads((folder / "benchmark.json").read_text())["benchmarks"]}
    bench = json.loads((folder / "figures.json").read_text())["bench"]
    recorded = marks["test_times_for_pytest_benchmark[decode_128]"]
    assert recorded["stats"]["median"] == pytest.approx(bench["decode"][0]["token_seconds"]["median"], rel=1e-3)
    assert recorded["extra_info"]["tokens_per_second"] == bench["decode"][0]["tokens_per_second"]
    library = recorded["extra_info"]["library"]
    current = (desk.root / "current").resolve()
    assert recorded["extra_info"]["release"] == current.name == held.release
    assert library["sha256"] == held.engine_sha256 == sha256(current / "package" / "axrun/engine/lib/libax_engine.so")
    page = (folder / "report.html").read_text()
    assert f"<h1>{said[0]}</h1>" in page

    health = json.loads((folder / "health.json").read_text())
    assert health["word"] in ("first", "healthy")
    assert health["faults"] == []
    assert health["versions"].items() >= {"system": "Debian GNU/Linux 12 (bookworm)"}.items()
    assert health["kit"] in page
    assert {"soak_ttft_50", "soak_answer_99", "soak_memory"} <= set(held.figures)
    assert json.loads((folder / "soak.json").read_text())["faults"] == []
    console = (folder / "console.log").read_text()
    assert f"Server listening on {desk.board.address} port 2222" in console, "the board's sshd, on its console"
    assert (held.blame, held.sensors) == ("", {})
    assert "The board reports no temperatures and no clocks." in page
    assert said[-1] == f"  report: {folder / 'report.html'}"


def test_a_fault_after_position_128_turns_accuracy_red(desk: Desk, bundle: Path, tmp_path: Path) -> None:
    """All digests match and the deploy probe succeeds; only logits far into a text are worse."""
    faulty = shutil.copytree(bundle, tmp_path / "faulty")
    plants.zero_rotary(faulty, 128)
    night = desk.start("--bundle", str(faulty))
    code, said = night.end()
    assert said[0].startswith(f"{HANDED_IN}layers: layer 0, ")
    assert "rotary" in said[0]
    assert re.search(r"\(mean KL divergence from the checkpoint is .* worse than its gate.*\)$", said[0])
    assert code == 1
    reports = json.loads((desk.newest() / "doctor.json").read_text())["reports"]
    assert {where: found["finding"]["stage"] for where, found in reports.items()} == {
        "here": "layers",
        "virtual": "layers",
    }
    (*_, held) = history.read(desk.history, "virtual", "tiny-qwen2").nights
    assert held.reason.startswith("mean KL divergence")
    assert desk.left(night) == []
    assert "deploy done" in " ".join(night.said)


def test_a_file_changed_on_the_board_is_red(desk: Desk, bundle: Path) -> None:
    """The engine is replaced after the deploy: the figures do not belong to the deployed release."""
    night = desk.start("--bundle", str(bundle), counts=False)
    night.wait_for("deploy done")
    (engine,) = (desk.root / "current").resolve().glob("package/axrun/session/ax_engine.py")
    engine.write_text(engine.read_text() + SLOW_DOWN)
    code, said = night.end()
    assert said[0].startswith(f"{HANDED_IN}the measured release differs from the deployed one: packages/")
    assert "/axrun/session/ax_engine.py has other bytes than were deployed (sha256 " in said[0]
    assert code == 1
    assert desk.left(night) == []


def test_a_dead_board_is_red(desk: Desk) -> None:
    dead = desk.yaml("dead", on="/bin/true", off="/bin/true")
    night = desk.start("--limit", "power on=30", board=str(dead))
    code, said = night.end()
    told = f"power on: virtual was switched on and does not answer: no sshd at {desk.board.address} port 2222 in 15 s"
    assert said[0] == f"{RED}{told} (on the second try; the first: {told})"
    assert code == 1
    assert desk.left(night) == []


def test_a_full_disk_is_red(desk: Desk, bundle: Path) -> None:
    on = f"{sys.executable} -m invoke --search-root {ROOT} board.up --board virtual --disk 24M"
    night = desk.start("--bundle", str(bundle), board=str(desk.yaml("small", on=on)))
    code, said = night.end()
    assert re.match(re.escape(HANDED_IN) + r"board: the disk of virtual has \d+ MB free, the p.* needs", said[0])
    assert code == 2
    assert desk.left(night) == []
    assert history.read(desk.history, "virtual", "tiny-qwen2").nights[-1].blame == "board"


def test_an_unhealthy_board_is_red_before_the_build(desk: Desk) -> None:
    """A file of the known-good bundle was changed, as by a failing disk."""
    if not (desk.root / "health").exists():  # if this test runs alone
        desk.start("--limit", "build=0.1").end()
    (tokenizer,) = (desk.root / "health").glob("models/*/hf/tokenizer.json")
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("a", "b", 1))
    try:
        night = desk.start()
        code, said = night.end()
    finally:
        tokenizer.write_text(text)
    assert said[0].startswith(f"{RED}board: the known-good bundle differs from the deployed one: health/models/")
    assert "/hf/tokenizer.json has other bytes than were deployed" in said[0]
    assert "invoke board.health --board virtual" in said[1]
    assert code == 1
    assert "build ..." not in night.said
    assert desk.left(night) == []
    held = history.read(desk.history, "virtual", "tiny-qwen2").nights[-1]
    assert (held.stage, held.blame) == ("health", "board")
    page = (desk.newest() / "report.html").read_text()
    assert "serial console when <b>health</b> failed" in page
    assert "Server listening on" in page


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (100, "virtual hangs: no answer to axrun eval in 40 s"),
        (250, "virtual hangs or is gone: ssh lost it during axrun eval"),  # after 60 s
    ],
)
def test_a_board_that_hangs_during_a_test_is_red(desk: Desk, bundle: Path, limit: int, told: str) -> None:
    night = desk.start("--bundle", str(bundle), "--limit", f"measure={limit}", "--no-retry", counts=limit == 100)
    night.wait_for("measure ...")
    night.wait_until(lambda: any(" eval " in what for what in commands(on_board(desk.board))))
    for pid in on_board(desk.board):
        os.kill(pid, signal.SIGSTOP)
    code, said = night.end()
    assert said[0] == HANDED_IN + told
    assert code == 1
    assert desk.left(night) == []


def cut_in_deploy(desk: Desk, night: Night, times: int) -> None:
    """Cuts the board's power after the deploy has started to use it."""
    night.wait_for("deploy ...", times)
    night.wait_until(lambda: any(" -I -S -u -c" in what for what in commands(on_board(desk.board))))
    virtual_board.down(desk.board)


def test_a_board_that_loses_power_once_is_flaky(desk: Desk, bundle: Path, tmp_path: Path) -> None:
    note = tmp_path / "note"
    tell = f'{sys.executable} -c \'import os, sys; open(sys.argv[1], "a").write(os.environ["NIGHT_FLAKY"])\' {note}'
    night = desk.start("--bundle", str(bundle), "--notify", tell, counts=False)
    cut_in_deploy(desk, night, 1)
    code, said = night.end()
    assert said[0].startswith("green: tiny-qwen2 (bundle handed in) on virtual (emulated): ")
    assert re.search(rf"; flaky: {LOST}, passed on the second try$", said[0])
    assert code == 0
    assert desk.left(night) == []
    held = history.read(desk.history, "virtual", "tiny-qwen2").nights[-1]
    assert (held.verdict, held.reason) == ("green", "")
    assert held.flaky == note.read_text()
    assert any(re.match(r"  virtual needed a second try in [1-9] of its last \d+ nights", line) for line in said)
    page = (desk.newest() / "report.html").read_text()
    assert "retried" in page
    assert f"<h1>{said[0].replace(chr(39), '&#39;')}</h1>" in page


def test_a_board_that_loses_power_twice_is_red_with_both_reasons(desk: Desk, bundle: Path) -> None:
    night = desk.start("--bundle", str(bundle), counts=False)
    cut_in_deploy(desk, night, 1)
    cut_in_deploy(desk, night, 2)
    code, said = night.end()
    assert re.fullmatch(re.escape(HANDED_IN) + rf"{LOST} \(on the second try; the first: {LOST}\)", said[0])
    assert code in (1, 2)
    assert desk.left(night) == []


def test_the_next_command_cleans_up_after_kill_9(desk: Desk, bundle: Path) -> None:
    def kill(night: Night) -> Path:
        night.process.kill()
        night.process.wait()
        shutil.rmtree(desk.newest())  # this night is not in the history
        (note,) = (desk.board.state / "held").glob("*.json")
        return Path(json.loads(note.read_text())["temporary"])

    first = desk.start()
    first.wait_for("build ...")
    first.wait_until(lambda: any("invoke build" in what for what in commands(desk.running(first))))
    temporary = kill(first)
    assert desk.running(first)

    second = desk.start("--bundle", str(bundle), counts=False)
    second.wait_for("deploy ...")
    killed = re.compile(r"nightly of tiny-qwen2 \(pid \d+, .*, in build\) was killed; clearing what it left")
    assert any(killed.match(line) for line in second.said)
    assert desk.running(first) == []
    assert not temporary.exists()
    temporary = kill(second)
    done = desk.invoke("board.free")
    assert done.stdout.startswith("held by nightly of tiny-qwen2 (pid ")
    assert "  the power of virtual was on: cut\n" in done.stdout
    assert desk.left(second) == []
    assert not temporary.exists()

    third = desk.start("--bundle", str(bundle))
    third.wait_for("measure ...")
    third.wait_until(lambda: any(" eval " in what for what in commands(on_board(desk.board))))
    temporary = kill(third)
    done = desk.invoke("board.free")
    assert "  the lock of the releases on virtual is free\n" in done.stdout
    assert desk.left(third) == []
    assert not temporary.exists()
    assert str(desk.board.state) not in Path("/proc/mounts").read_text()
    assert desk.invoke("board.free").stdout == "nothing of virtual was held\n"


def test_a_held_board_is_red_with_its_holder(desk: Desk) -> None:
    with place.hold(desk.board):
        night = desk.start()
        code, said = night.end()
        assert said[0] == f"{RED}reserve: virtual is held by {place.owner()}"
    assert code == 2
    assert desk.left(night) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_night_releases_the_board(number: signal.Signals, desk: Desk, bundle: Path) -> None:
    night = desk.start("--bundle", str(bundle), counts=False)
    night.wait_for("deploy ...")
    night.process.send_signal(number)
    code, said = night.end()
    assert said[0] == f"{HANDED_IN}deploy: {number.name} ended the night"
    assert code == 2
    assert desk.left(night) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--limit", "measure=soon"], "--limit 'measure=soon': expected a stage and its seconds: measure=600"),
        (["--limit", "sleep=5"], "--limit sleep=5: expected seconds of a stage: power on, build,"),
        (["--model", "tiny-qwen"], "no model is named 'tiny-qwen'"),
        (["--bundle", "none"], "no bundle folder none"),
        (["virtuel"], "no board is named 'virtuel': ci/boards/ has "),
    ],
)
def test_an_impossible_night_is_a_one_line_error(flags: list[str], told: str, desk: Desk) -> None:
    night = desk.start(*flags) if flags[0].startswith("-") else desk.start(board=flags[0])
    code, said = night.end()
    assert (code, said) == (2, [])
    assert any(line.startswith(f"error: {told}") for line in night.said)
    assert desk.left(night) == []


def test_every_night_is_recorded_in_the_history(desk: Desk) -> None:
    """Whichever nights ran before in this folder; a matrix has its own history."""
    read = [history.read(kept, "virtual", "tiny-qwen2") for kept in (desk.history, *desk.folder.glob("history of *"))]
    nights = [night for found in read for night in found.nights]
    folders = list(desk.newest().parent.iterdir())
    assert [found.faults for found in read if found.faults] == []
    assert len(nights) == len(folders)
    assert all((folder / "report.html").is_file() for folder in folders)
    assert all(night.reason or night.green for night in nights)
