"""Quarantined failures are reported but turn no night red until their end date; incomplete entries are refused."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.nightly import gate, history, preflight, quarantine
from ci.nightly.junit import Case, cases
from ci.nightly.quarantine import Excused, Quarantine
from ci.nightly.stage import Stage
from ci.nightly.verdict import verdict
from tests.ci.test_history import night
from tests.ci.test_verdict import WORSE, held, judged

TODAY = datetime.date(2026, 11, 26)
KEYS = {
    "board": '"virtual"',
    "model": '"tiny-qwen2"',
    "figure": '"mean_kld"',
    "owner": '"jane"',
    "reason": '"the fan is broken"',
    "until": "2026-12-24",
}
TEST = "test_texts_are_tokenised_like_the_checkpoint"


def entry(**changed: str | None) -> str:
    keys = {name: value for name, value in {**KEYS, **changed}.items() if value is not None}
    return "[[quarantine]]\n" + "".join(f"{name} = {value}\n" for name, value in keys.items())


def load(folder: Path, *entries: str, today: datetime.date = TODAY) -> Quarantine:
    file = folder / "quarantine.toml"
    file.write_text("\n".join(entries))
    return quarantine.load("virtual", "tiny-qwen2", ["tiny-qwen2"], ["virtual", "ax650"], file, today=today)


def excuse(found: Quarantine, stages: list[Stage], figures: list[gate.Judgement], seen: list[Case]) -> Excused:
    return quarantine.excuse(found, stages, figures, seen)


def settled(excused: Excused) -> tuple[str, str]:
    found = excused.verdict(verdict(excused.stages, excused.judged, excused.tests, [], night()))
    return found.word, found.reason


def test_a_figure_is_red_and_does_not_count(tmp_path: Path) -> None:
    failed = [held("measure", 1, "== 1 failed ==")]
    seen = [Case("test_what_is_left", False, (WORSE,)), Case("test_speed", True, ())]
    excused = excuse(load(tmp_path, entry()), failed, judged(mean_kld=0.01), seen)
    assert settled(excused) == ("green", "")
    assert excused.headline() == ("; quarantined: mean KL divergence from the checkpoint until 2026-12-24 (jane)")
    assert excused.record() == {"figure mean_kld": "until 2026-12-24, jane: the fan is broken"}
    assert [done.outcome for done in excused.stages] == ["quarantined"]
    assert [one.outcome for one in excused.judged] == ["quarantined", "within"]


def test_the_others_still_count(tmp_path: Path) -> None:
    failed = [held("measure", 1, "== 2 failed ==")]
    seen = [Case("test_what_is_left", False, (WORSE,))]
    excused = excuse(load(tmp_path, entry()), failed, judged(mean_kld=0.01, decode_128=1.0), seen)
    assert settled(excused)[0] == "red"
    assert settled(excused)[1].startswith("decode behind 128 is 1 token/s, worse than its gate")
    hangs = Case("test_speed", False, ("virtual hangs: no answer to axrun bench in 40 s",))
    excused = excuse(load(tmp_path, entry()), failed, judged(mean_kld=0.01), [*seen, hangs])
    assert settled(excused) == ("red", hangs.messages[0])


def test_a_test_is_quarantined_by_its_name(tmp_path: Path) -> None:
    failed = [held("measure", 1, "== 1 failed ==")]
    found = load(tmp_path, entry(figure=None, test=f'"{TEST}"'))
    assert settled(excuse(found, failed, judged(), [Case(TEST, False, ("other ids",))])) == ("green", "")
    assert settled(excuse(found, failed, judged(), [Case("test_other", False, ("other ids",))]))[0] == "red"


def test_a_night_that_ends_in_a_quarantined_stage_is_not_judged(tmp_path: Path) -> None:
    found = load(tmp_path, entry(figure=None, stage='"count"'))
    excused = excuse(found, [held("build"), held("count", 1, "valgrind crashed"), held("power off")], [], [])
    assert settled(excused) == (
        "green",
        "recorded, not judged: stage count is quarantined, and nothing was measured",
    )
    worse = excuse(found, [held("count", 1, "valgrind crashed"), held("power off", 1, "the relay is stuck")], [], [])
    assert settled(worse) == ("red", "power off: the relay is stuck")


def test_after_its_end_it_counts_again_and_says_so(tmp_path: Path) -> None:
    last, after = datetime.date(2026, 12, 24), datetime.date(2026, 12, 25)
    failed, seen = [held("measure", 1, "== 1 failed ==")], [Case("test_what_is_left", False, (WORSE,))]
    found = load(tmp_path, entry(), today=last)
    assert settled(excuse(found, failed, judged(mean_kld=0.01), seen))[0] == "green"
    assert list(found.notes()) == []
    found = load(tmp_path, entry(), today=after)
    assert settled(excuse(found, failed, judged(mean_kld=0.01), seen)) == ("red", WORSE)
    (note,) = found.notes()
    assert note == (
        "the quarantine of mean KL divergence from the checkpoint expired on 2026-12-24 (jane: the fan is broken): it "
        "counts again; remove the entry from quarantine.toml"
    )


def test_a_quarantined_item_that_passes_is_a_note(tmp_path: Path) -> None:
    found = load(tmp_path, entry(), entry(figure=None, test=f'"{TEST}"'), entry(figure=None, stage='"deploy"'))
    well = [held("deploy"), held("measure")]
    told = list(excuse(found, well, judged(), [Case(TEST, True, ())]).notes())
    assert [note.partition(" is ")[0] for note in told] == [
        "mean KL divergence from the checkpoint",
        f"test {TEST}",
        "stage deploy",
    ]
    assert all(note.endswith("but it passed: remove the entry from quarantine.toml") for note in told)
    assert list(excuse(found, [held("build", 1, "red")], [], []).notes()) == []  # it did not get so far


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            entry(owner=None),
            "quarantine.toml line 1: the entry has no owner; it needs board, model, owner, reason, until",
        ),
        (entry(reason=None, until=None), "the entry has no reason and no until; "),
        (entry(figure=None), "the entry has board, model, owner, reason, until; expected one of figure, test, stage"),
        (entry(stage='"deploy"'), "expected one of figure, test, stage beside the others"),
        (entry(owner='""'), "line 1: owner is '', expected one line of text"),
        (entry(until='"soon"'), "line 1: until is 'soon', expected a date: 2026-12-24"),
        (entry(until="2027-02-01"), "ends on 2027-02-01, in 67 days; at most 60"),
        (entry(board='"virtuel"'), "matches nothing: no board is named 'virtuel'; there are virtual, ax650"),
        (entry(model='"tiny"'), "matches nothing: no model is named 'tiny'"),
        (entry(figure='"ttft_16"'), "matches nothing: no gate judges it; there are mean_kld,"),
        (entry(figure='"fps"'), "no figure is named 'fps'"),
        (entry(figure=None, stage='"sleep"'), "matches nothing: the stages are power on, build,"),
        (entry(figure=None, test='"test_it"'), "matches nothing: tests/hil has test_accuracy"),
        ("[quarantine]\n", "expected entries: [[quarantine]]"),
        ("quarantine = [\n", "quarantine.toml is not valid TOML: "),
        (entry() + entry(until="2026-12-01"), "line 8: figure mean_kld of tiny-qwen2 on virtual is quar"),
        (entry(figure=None, stage='"measure"'), "stage measure of tiny-qwen2 on virtual cannot be quarantined: it "),
        (entry(figure=None, stage='"health"'), "cannot be quarantined: measurements on an unhealthy board"),
        (entry(figure=None, stage='"doctor"'), "cannot be quarantined: it never turns a night red"),
        (entry(figure=None, stage='"count"', board='"ax650"'), "instructions are counted only for emulated boards"),
    ],
)
def test_an_incomplete_entry_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load(tmp_path, text)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_it_is_refused_before_the_night(tmp_path: Path) -> None:
    from ci.device import place

    file = tmp_path / "quarantine.toml"
    file.write_text(entry(owner=None))
    with pytest.raises(BadInput, match="has no owner"):
        preflight.check(place.find("virtual"), "tiny-qwen2", None, tmp_path, history.History((), ()), gate.GATES, file)


def test_the_file_of_the_tree_is_whole() -> None:
    models = [path.stem for path in (quarantine.FILE.parents[1] / "models").glob("*.toml")]
    boards = [path.stem for path in (quarantine.FILE.parent / "boards").glob("*.yaml")]
    quarantine.load("virtual", "tiny-qwen2", models, boards)


def test_cases_are_read_from_junit_xml(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_well():\n    pass\n\n@pytest.mark.parametrize('n', [1])\ndef test_bad(n):\n"
        "    pytest.fail('it is worse', pytrace=False)\n\ndef test_not():\n    pytest.skip('later')\n"
    )
    junit = tmp_path / "junit.xml"
    flags = ["-q", "-p", "no:cacheprovider", "-p", "no:labgrid", "--rootdir", str(tmp_path), f"--junitxml={junit}"]
    subprocess.run([sys.executable, "-m", "pytest", str(tmp_path / "test_it.py"), *flags], cwd=tmp_path, timeout=300)
    assert cases(junit) == [
        Case("test_well", True, ()),
        Case("test_bad", False, ("it is worse",)),
        Case("test_not", False, ()),
    ]
