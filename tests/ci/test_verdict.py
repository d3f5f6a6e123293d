"""The reason of a red night: one line, the reason that explains the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci.nightly import gate
from ci.nightly.gate import Gate, Judgement
from ci.nightly.history import Night
from ci.nightly.junit import failures
from ci.nightly.stage import INTERRUPTED, TIMED_OUT, Stage
from ci.nightly.verdict import drifts, verdict
from tests.ci.test_history import night

GATES = {
    "mean_kld": Gate(1e-5, 1e-6, "nats", "measured", "nights"),
    "decode_128": Gate(20.0, 4.0, "token/s", "measured", "nights"),
}
WELL = {"mean_kld": 1e-5, "decode_128": 20.0}
WORSE = "mean KL divergence from the checkpoint is 0.01 nats, worse than its gate 1.00e-05 ± 1.00e-06 nats"


def held(name: str, code: int = 0, reason: str = "") -> Stage:
    return Stage(name, code, 1.0, 10.0, reason, Path("none"))


def judged(**changed: float | None) -> list[Judgement]:
    figures = {name: value for name, value in {**WELL, **changed}.items() if value is not None}
    return gate.judge(figures, GATES)


def test_green_needs_every_figure_within_its_gate() -> None:
    found = verdict([held("build"), held("measure")], judged(), [], [], night())
    assert (found.word, found.code, found.reason) == ("green", 0, "")


@pytest.mark.parametrize(("code", "exit_code"), [(1, 1), (2, 2), (TIMED_OUT, 1), (INTERRUPTED, 2)])
def test_a_stage_that_failed_is_the_reason(code: int, exit_code: int) -> None:
    stages = [held("build"), held("deploy", code, "no room on it\nMake some."), held("power off", 1, "stuck")]
    found = verdict(stages, [], [], [], night())
    assert (found.reason, found.advice) == ("deploy: no room on it", "Make some.")
    assert (found.word, found.code, found.stage) == ("red", exit_code, "deploy")


def test_a_board_that_cannot_be_switched_off_makes_a_good_night_red() -> None:
    found = verdict([held("measure"), held("power off", 1, "the relay is stuck")], judged(), [], [], night())
    assert (found.word, found.reason) == ("red", "power off: the relay is stuck")


def test_a_figure_says_more_than_pytest() -> None:
    stages = [held("measure", 1, "== 2 failed in 3 s =="), held("power off")]
    tests = [f"{WORSE} (and 1 more)"]
    found = verdict(stages, judged(mean_kld=0.01, decode_128=30.0), tests, [], night())
    assert found.reason == f"{WORSE} (and 1 more)"
    assert "gate.record --board virtual --model tiny-qwen2" in found.advice


def test_a_broken_test_outranks_a_missing_figure() -> None:
    tests = ["virtual hangs: no answer to axrun bench in 40 s"]
    found = verdict([held("measure", 1, "== 1 failed ==")], judged(decode_128=None), tests, [], night())
    assert found.reason == tests[0]
    found = verdict([held("measure", 1, "== 1 failed ==")], judged(decode_128=None), [], [], night())
    assert found.reason == "decode behind 128 was not measured; its gate expects 20 ± 4 token/s"


def test_pytest_itself_can_fail() -> None:
    stages = [held("measure", 4, "ERROR: file or directory not found: tests/hil")]
    assert verdict(stages, [], [], [], night()).reason == f"measure: {stages[0].reason}"


def test_a_night_that_measured_nothing_or_has_no_gate_is_never_green() -> None:
    assert verdict([held("measure")], [], [], [], night()).reason == "nothing was measured on the board"
    ungated = gate.judge(WELL, {})
    told = ["no gates for cpu bundles here: tiny-qwen2 on virtual"] * 2
    found = verdict([held("measure", 1, "2 failed")], ungated, told, [], night())
    assert found.reason == "no gates for cpu bundles here"
    assert found.code == 1
    assert "invoke gate.record --board virtual --model tiny-qwen2" in found.advice


def test_the_same_commit_must_build_the_same_bytes() -> None:
    files = {"a.axmodel": "1", "b.axmodel": "2", "reference.npz": "3"}
    before = [night(1, files=files)]
    now = night(2, files={**files, "b.axmodel": "9", "reference.npz": "4"})
    found = verdict([held("measure")], judged(), [], before, now)
    assert found.reason == ("the build is not reproducible: on 2026-11-01 the same commit built other bytes: b.axmodel")
    for other in ({"commit": "36dd881"}, {"commit": "5b2a0a6+"}, {"maker": "pulsar2"}, {"handed_in": True}):
        changed = night(2, **{"files": now.files, **other})
        assert verdict([held("measure")], judged(), [], before, changed).word == "green"
    handed_in = [night(1, files=files, handed_in=True)]  # of any commit
    assert verdict([held("measure")], judged(), [], handed_in, now).word == "green"


def test_the_measured_release_must_be_the_deployed_one() -> None:
    unlike = ["models/0/hf/tokenizer.json has other bytes than were deployed", "current points at releases/1"]
    found = verdict([held("measure", 1, "1 failed")], judged(mean_kld=0.01), ["x"], [], night(), unlike)
    assert found.reason == f"the measured release differs from the deployed one: {unlike[0]} (and 1 more)"
    assert (found.code, found.stage) == (1, "measure")


def test_a_night_without_gates_is_green_only_where_it_says_that_it_is_not_judged() -> None:
    unjudged = "recorded, not judged: no gates for cpu bundles yet, night 1 of 5"
    found = verdict([held("measure")], gate.judge(WELL, {}), [], [], night(), (), unjudged)
    assert (found.word, found.code, found.reason) == ("green", 0, unjudged)
    assert "invoke gate.record --board virtual --model tiny-qwen2 --maker cpu" in found.advice
    broken = verdict([held("measure", 1, "")], gate.judge(WELL, {}), ["it hangs"], [], night(), (), unjudged)
    assert (broken.word, broken.reason) == ("red", "it hangs")
    assert verdict([held("measure")], [], [], [], night(), (), unjudged).reason == "nothing was measured on the board"


@pytest.mark.parametrize(
    ("stages", "tests"),
    [
        ([held("power on", 1, "virtual was switched on and does not answer")], []),
        ([held("build", -9, "build was killed by the kernel, out of memory")], []),
        ([held("measure", 1, "")], ["virtual hangs: no answer to axrun bench in 40 s"]),
        ([held("measure", 1, "")], ["axrun eval was killed on virtual: it had 812 MB"]),
        ([held("measure", 4, "ERROR: file or directory not found: tests/hil")], []),
    ],
)
def test_only_figures_advise_to_record_new_gates(stages: list[Stage], tests: list[str]) -> None:
    found = verdict(stages, judged(decode_128=None), tests, [], night())
    assert found.code
    assert "gate.record" not in found.advice
    assert "gate.record" in verdict([held("measure", 1, "")], judged(mean_kld=0.01), [], [], night()).advice


def test_failures_are_read_as_pytest_writes_them(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuites><testsuite>"
        '<testcase name="a"><failure message="Failed: it is slow &lt;b&gt;">x</failure></testcase>'
        '<testcase name="b"><error message="axrun.errors.CheckFailed: no answer&#10;Look."/></testcase>'
        '<testcase name="c"/><testcase name="d"><failure message="assert 1 == 2"/></testcase>'
        '<testcase name="f"><error message="failed on setup with &quot;Failed: it is off&quot;"/></testcase>'
        '<testcase name="e"><skipped message="x"/></testcase></testsuite></testsuites>'
    )
    assert failures(junit) == ["it is slow <b>", "no answer\nLook.", "assert 1 == 2", "it is off"]
    assert failures(tmp_path / "none.xml") == []
    junit.write_text("<testsuites>")
    assert failures(junit) == []


def test_a_drift_within_the_gate_is_a_note() -> None:
    before = [night(n, figures={"decode_128": 21.0, "mean_kld": 1e-5}) for n in range(1, 8)]

    def told(value: float, past: list[Night] = before) -> list[str]:
        return list(drifts({"decode_128": value, "mean_kld": 1e-5}, GATES, past, "cpu"))

    (said,) = told(18.5)
    assert said == (
        "decode behind 128 is drifting: 18.5 token/s, the last 7 green nights had 21 token/s; still within its gate"
    )
    assert told(19.5) == []
    assert told(23.9) == []  # better
    assert told(18.5, before[:4]) == []  # too few to tell
