"""A matrix: reading its file, scheduling its nights in parallel, interruption, and its page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from axrun.errors import BadInput, CheckFailed
from ci.device import place
from ci.device.place import Board
from ci.nightly import built, checkout, history, matrix, nights, preflight, run_folder, summary, variant
from ci.nightly.matrix import Cell, Matrix
from ci.nightly.matrix_run import CellResult, Commands, Run
from ci.nightly.report.matrix import Page
from ci.nightly.summary import Judged, Summary
from tests.ci.test_history import night
from tests.ci.test_report import HOSTILE, Outline

ROOT = Path(__file__).resolve().parents[2]
MARK = "MATRIX_OF_A_TEST"  # in the environment of everything a run starts
SECONDS = 120  # on a machine that does ten other things
PLAIN = """# nights
boards = ["virtual", "ax650"]
models = ["tiny-qwen2"]
weight_type = [
  "s8",
  "s4",
]

[[exclude]]
board = "ax650"
weight_type = "s4"
reason = "not yet"
"""


@pytest.fixture(autouse=True)
def no_board_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*matrix.OF_ONE, "LG_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)


def written(folder: Path, text: str = PLAIN) -> Path:
    file = folder / "matrix.toml"
    file.write_text(text)
    return file


def board_yaml(folder: Path, number: int) -> str:
    """A user's board without a power port."""
    text = (place.BOARDS / "virtual.yaml").read_text().replace("board: virtual", f"board: virtual-{number}")
    file = folder / f"v{number}.yaml"
    lines = [
        f"        {line.split(':')[0].strip()}: /bin/true" if "cmd_o" in line else line for line in text.splitlines()
    ]
    file.write_text("\n".join(lines))
    return file.name


def test_every_night_of_the_file_board_by_board(tmp_path: Path) -> None:
    found = matrix.read(written(tmp_path))
    assert [cell.name for cell in found.cells] == [
        "tiny-qwen2 on virtual (emulated)",
        "tiny-qwen2@s4 on virtual (emulated)",
        "tiny-qwen2 on ax650",
    ]
    assert found.excluded == {("ax650", "tiny-qwen2@s4"): "not yet"}
    assert [cell.build for cell in found.cells] == [
        ("tiny-qwen2", "AX650"),
        ("tiny-qwen2@s4", "AX650"),
        ("tiny-qwen2", "AX650"),
    ]
    assert any(target.board == "ax650" for target in found.targets)


def test_the_shipped_files_can_be_read() -> None:
    assert len(matrix.read(ROOT / "ci" / "matrix.toml").cells) == 2
    farm = matrix.read(ROOT / "ci" / "matrix-farm.toml")
    assert [cell.build for cell in farm.cells] == [
        ("qwen2-0.5b", "AX650"),
        ("qwen2-0.5b@s4", "AX650"),
        ("qwen2-0.5b", "AX620E"),
    ]


def test_board_yamls_are_relative_to_the_matrix_file(tmp_path: Path) -> None:
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    found = matrix.read(written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\n'))
    assert [board.name for board in found.boards] == ["virtual-2", "virtual-3"]
    assert all(board.emulated and board.title.endswith(" (emulated)") for board in found.boards)
    assert len({board.state for board in found.boards}) == 2
    assert [model.name for model in found.models] == ["tiny-qwen2"]  # in its own type


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"virtual", ', '"virtuel", ', "line 2: no board is named 'virtuel': ci/boards/ has "),
        ('"ax650"]', '"virtual"]', "line 2: 'virtual' is twice in boards"),
        ('["tiny-qwen2"]', '["tiny-qwen"]', "line 3: no model is named 'tiny-qwen'"),
        ('["tiny-qwen2"]', '["tiny-qwen2@s4"]', "line 3: 'tiny-qwen2@s4' has a weight type: list it in weight_type"),
        ('["tiny-qwen2"]', "[]", "line 3: models is empty"),
        ('["tiny-qwen2"]', '"tiny-qwen2"', "line 3: models is 'tiny-qwen2', expected a list of names"),
        ('["tiny-qwen2"]', "[3]", "line 3: models is [3], expected a list of names"),
        (
            '  "s4",',
            '  "s5",',
            "line 6: no weight type is named 's5': there are fp32, fp16, bf16, s8, s4, fp8_e4m3, fp8_e5m2",
        ),
        ('  "s4",', '  "s8",', "line 6: 's8' is twice in weight_type"),
        ('models = ["tiny-qwen2"]\n', "", "line 1: models is missing"),
        ("# nights", "nights = 3", "line 1: 'nights' is not known: expected boards, models, weight_type"),
        ('board = "ax650"\n', 'bord = "ax650"\n', "line 10: 'bord' is not known: [[exclude]] has board, model"),
        (
            'board = "ax650"\n',
            'board = "ax630c"\n',
            "line 9: this exclusion matches no night of the matrix: board ax630c",
        ),
        ('reason = "not yet"\n', "", "line 9: this exclusion has no reason"),
        ('reason = "not yet"\n', "reason = 3\n", "line 12: reason is 3, expected text"),
        ('board = "ax650"\nweight_type = "s4"\n', 'model = "tiny-qwen2"\n', "line 9: every night is excluded"),
        ('board = "ax650"\nweight_type = "s4"\n', "", "line 9: this exclusion names no board"),
        ("[[exclude]]", "[exclude]", "line 9: exclude is not a list of tables: expected"),
        ("# nights", 'targets = "none.toml"', "line 1: targets is 'none.toml', expected an existing file"),
        ("models =", "models", "Expected '=' after a key in a key/value pair (at line 3, column 8)"),
    ],
)
def test_an_error_names_its_line(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert PLAIN.count(old) == 1
    file = written(tmp_path, PLAIN.replace(old, new))
    with pytest.raises(BadInput) as caught:
        matrix.read(file)
    assert str(caught.value).startswith(str(file))
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_one_name_is_one_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.yaml").write_text((place.BOARDS / "ax650.yaml").read_text())
    file = written(tmp_path, 'models = ["tiny-qwen2"]\nboards = [\n  "ax650",\n  "other.yaml",\n]\n')
    with pytest.raises(BadInput, match=r"line 4: 'other\.yaml' has the board name ax650, like another"):
        matrix.read(file)
    monkeypatch.setenv("LG_BOARD_ADDRESS", "127.0.0.1")
    with pytest.raises(BadInput, match="line 2: LG_BOARD_ADDRESS would apply to all 2 boards"):
        matrix.read(written(tmp_path))


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*none.toml: No such file or directory"):
        matrix.read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"bytes.toml is not valid TOML: 'utf-8' codec can't decode"):
        matrix.read(tmp_path / "bytes.toml")


def test_every_night_that_cannot_be_held_is_named_before_any_is(tmp_path: Path) -> None:
    for number in range(preflight.UNJUDGED):
        history.append(tmp_path, night(number + 1, model="tiny-qwen2@s4", gates={}))
    text = PLAIN.replace('"ax650"]', '"ax650-farm"]')
    with pytest.raises(BadInput) as caught:
        matrix.plans(matrix.read(written(tmp_path, text)), tmp_path)
    said = str(caught.value).splitlines()
    assert said[0] == f"2 of 3 nights of {tmp_path / 'matrix.toml'} cannot run:"
    assert said[1].startswith(
        "tiny-qwen2@s4 on virtual (emulated): 5 nights of cpu bundles of tiny-qwen2@s4 on virtual"
    )
    assert said[2].endswith("invoke gate.record --board virtual --model tiny-qwen2@s4 --maker cpu")
    assert said[3] == "tiny-qwen2 on ax650: the board is in a farm: set its coordinator, LG_COORDINATOR=host:20408"


def test_the_nights_that_can_be_held_have_their_gates(tmp_path: Path) -> None:
    found = matrix.plans(matrix.read(written(tmp_path)), tmp_path)
    judged = {cell.name: not plan.unjudged for cell, plan in found.items()}
    assert judged == {
        "tiny-qwen2 on virtual (emulated)": True,
        "tiny-qwen2@s4 on virtual (emulated)": False,
        "tiny-qwen2 on ax650": False,
    }


def test_a_variant_has_a_name_of_its_own_only_in_another_type() -> None:
    assert variant.find("tiny-qwen2@s8") == variant.find("tiny-qwen2")
    other = variant.find("tiny-qwen2@s4")
    assert (variant.find("tiny-qwen2").name, other.name) == ("tiny-qwen2", "tiny-qwen2@s4")
    assert (variant.find("tiny-qwen2").flags(), other.flags()) == ([], ["--weight_type", "s4"])
    with pytest.raises(BadInput, match=r"no weight type is named 's44': .* \(did you mean s4\?\)"):
        variant.find("tiny-qwen2@s44")
    with pytest.raises(BadInput, match="no model is named ''"):
        variant.find("@s4")


def test_the_gates_of_a_variant_are_no_misspelling_of_its_models(tmp_path: Path) -> None:
    (tmp_path / "gates" / "virtual").mkdir(parents=True)
    (tmp_path / "gates" / "virtual" / "tiny-qwen2@s4.toml").write_text("")
    plan = preflight.check(
        place.find("virtual"), "tiny-qwen2", None, tmp_path, history.read(tmp_path, "virtual", "x"), tmp_path / "gates"
    )
    assert plan.unjudged


# A stand-in for a night or a build: records when it began and ended, and ends on a signal. It takes
# some seconds; where they are negative, so many at most until two nights have begun.
ACTOR = """
import json, os, signal, sys, time
what, seconds, log, then = sys.argv[1], float(sys.argv[2]), sys.argv[3], sys.argv[4:]
def note(word):
    with open(log, "a") as file:
        file.write(json.dumps([what, word, time.monotonic(), os.getpid()]) + "\\n")
def nights():
    return sum(word == "begins" and not what.startswith("build") for what, word, *_ in map(json.loads, open(log)))
def end(number, frame):
    note(signal.Signals(number).name)
    sys.exit(2)
signal.signal(signal.SIGTERM, end)
note("begins")
print(f"{what} speaks", file=sys.stderr, flush=True)
deadline = time.monotonic() + abs(seconds)
while time.monotonic() < deadline and not (seconds < 0 and nights() >= 2):
    time.sleep(0.02)
note("ends")
if then:
    file, text, code = then
    if file:
        open(file, "w").write(text)
    else:
        print(text, file=sys.stderr)
    sys.exit(int(code))
"""


def said_of(cell: Cell, code: int = 0, **other: object) -> Summary:
    word = "red" if code else "green"
    reason = str(other.pop("reason", "it is slow" if code else ""))
    held = night(3, board=cell.board.name, model=cell.model.name, verdict=word, reason=reason, **other)
    figures = (Judged("mean_kld", "within", "8e-06 nats", "8e-06 ± 4e-07 nats"),)
    headline = f"{word}: {cell.name}: {reason or '1 figures within their gates'}"
    return Summary(headline, word, code, reason, "", figures, (), "", dataclasses.asdict(held))


def acting(log: Path, seconds: float, codes: Callable[[Cell], int | None]) -> Commands:
    """Those of a night, which writes a summary with `codes` of its cell (None: an error instead), and of a build."""
    python = [sys.executable, "-c", ACTOR]

    def hold(cell: Cell, folder: Path, file: Path) -> Sequence[str]:
        code = codes(cell)
        told = ["", "error: no such thing", "2"]
        if code is not None:
            told = [str(file), json.dumps(dataclasses.asdict(said_of(cell, code))), str(code)]
        return [*python, f"{cell.board.name} {cell.model.name}", str(seconds), str(log), *told]

    def build(model: str, chip: str, folder: Path) -> Sequence[str]:
        return [*python, f"build {model} {chip}", str(max(seconds, 0.1)), str(log)]

    def package(board: Board) -> Sequence[str]:
        return build("package", board.name, log)

    return Commands(hold, build, package)


def noted(log: Path) -> list[tuple[str, str, float, int]]:
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def spans(log: Path) -> dict[str, tuple[float, float]]:
    found: dict[str, list[float]] = {}
    for what, _, when, _ in noted(log):
        found.setdefault(what, []).append(when)
    return {what: (times[0], times[-1]) for what, times in found.items()}


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def run(found: Matrix, folder: Path, codes: Callable[[Cell], int | None], said: list[str]) -> list[CellResult]:
    folder.mkdir()
    return Run(found, folder, acting(folder / "log", -SECONDS, codes), said.append).run()


def test_boards_go_at_the_same_time_their_nights_and_all_builds_one_by_one(tmp_path: Path) -> None:
    found = matrix.read(written(tmp_path, PLAIN.partition("[[exclude]]")[0]))
    said: list[str] = []
    ran = run(found, tmp_path / "run", lambda cell: 0, said)
    assert [(entry.cell, entry.code) for entry in ran] == [(cell, 0) for cell in found.cells]
    at = spans(tmp_path / "run" / "log")
    builds = [what for what in at if what.startswith("build")]
    assert builds == [  # each once, for both boards
        *("build tiny-qwen2 AX650", "build package virtual", "build package ax650", "build tiny-qwen2@s4 AX650")
    ]
    assert not any(overlap(at[one], at[other]) for one, other in itertools.pairwise(builds))
    for board in ("virtual", "ax650"):
        assert not overlap(at[f"{board} tiny-qwen2"], at[f"{board} tiny-qwen2@s4"])
        assert at[builds[0]][1] < at[f"{board} tiny-qwen2"][0]
        assert at[builds[3]][1] < at[f"{board} tiny-qwen2@s4"][0]
        assert at[f"build package {board}"][1] < at[f"{board} tiny-qwen2"][0]
    assert overlap(at["virtual tiny-qwen2"], at["ax650 tiny-qwen2"])
    assert "[virtual tiny-qwen2] virtual tiny-qwen2 speaks" in said
    assert "[build tiny-qwen2 for AX650] build tiny-qwen2 AX650 speaks" in said
    assert not (tmp_path / "run" / "builds").exists()


def test_one_night_that_fails_stops_no_other(tmp_path: Path) -> None:
    codes = {
        "tiny-qwen2 on virtual (emulated)": 1,
        "tiny-qwen2@s4 on virtual (emulated)": 0,
        "tiny-qwen2 on ax650": None,
    }
    ran = run(matrix.read(written(tmp_path)), tmp_path / "run", lambda cell: codes[cell.name], [])
    assert [(entry.code, entry.reason) for entry in ran] == [
        (1, "it is slow"),
        (0, ""),
        (2, "it ended with exit code 2: no such thing"),
    ]
    page = Page(matrix.read(tmp_path / "matrix.toml"), ran, "2026-11-03T02:00:00Z", 1.0, tmp_path)
    assert page.code == 1
    assert page.headline == (
        "red: 2 of 3 nights on 2 boards: tiny-qwen2 on virtual (emulated): it is slow (and 1 more)"
    )


DRIVER = """
import sys
from pathlib import Path
from ci.nightly import matrix
from ci.nightly.matrix_run import Run
from tests.ci.test_matrix import acting
folder = Path(sys.argv[1])
ran = Run(matrix.read(folder / "matrix.toml"), folder, acting(folder / "log", 100, lambda cell: 0), print).run()
for entry in ran:
    print(f"{entry.code} {entry.reason}")
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two boards whose bundles are built, and whose nights would take long."""
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\nweight_type = ["s8", "s4"]\n')
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, MARK: str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


def until(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def left(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_nights_and_is_reported(
    number: signal.Signals, driver: subprocess.Popen[str], tmp_path: Path
) -> None:
    until(lambda: noted(tmp_path / "log"))
    driver.send_signal(number)
    said = driver.communicate(timeout=SECONDS)[0].splitlines()
    assert [(what, word) for what, word, _, _ in noted(tmp_path / "log")] == [
        ("build tiny-qwen2 AX650", "begins"),
        ("build tiny-qwen2 AX650", "SIGTERM"),
    ]
    assert said[-4:] == [f"2 not held: {number.name} ended the matrix"] * 4
    assert left(str(tmp_path)) == []


def test_nights_end_when_the_scheduler_is_killed(driver: subprocess.Popen[str], tmp_path: Path) -> None:
    until(lambda: noted(tmp_path / "log"))
    driver.kill()
    until(lambda: left(str(tmp_path)) == [])
    assert noted(tmp_path / "log")[-1][:2] == ("build tiny-qwen2 AX650", "SIGTERM")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, built.Built]:
    folder = tmp_path / "made"
    (folder / "tiny-qwen2").mkdir(parents=True)
    (folder / "tiny-qwen2" / "manifest.json").write_text("{}")
    record = built.Built("tiny-qwen2", "AX650", checkout.commit(), built._manifest(folder / "tiny-qwen2"), 3.5, "")
    record.write(folder)
    return folder, record


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "tiny-qwen2@s4"}, "its model is 'tiny-qwen2@s4', expected 'tiny-qwen2'"),
        ({"chip": "AX620E"}, "its chip is 'AX620E', expected 'AX650'"),
        ({"commit": "0" * 40}, f"its commit is '{'0' * 40}', expected "),
        ({"manifest_sha256": ""}, "its manifest's sha256 is '', expected "),
        ({"seconds": "long"}, "is not the record of a build: expected strings, and a number"),
    ],
)
def test_a_shared_build_is_used_only_if_it_matches(
    change: dict[str, object], told: str, made: tuple[Path, built.Built]
) -> None:
    folder, record = made
    model = variant.find("tiny-qwen2")
    assert built.require(folder, model, "AX650") == record
    dataclasses.replace(record, **change).write(folder)  # type: ignore[arg-type]
    with pytest.raises(BadInput) as caught:
        built.require(folder, model, "AX650")
    assert told in str(caught.value)


def test_a_shared_build_that_failed_says_why(made: tuple[Path, built.Built], tmp_path: Path) -> None:
    folder, record = made
    dataclasses.replace(record, reason="layer 3 is worse").write(folder)
    with pytest.raises(CheckFailed, match="layer 3 is worse"):
        built.require(folder, variant.find("tiny-qwen2"), "AX650")
    (folder / built.RECORD).write_text("[]")
    with pytest.raises(BadInput, match="is not the record of a build"):
        built.read(folder)
    with pytest.raises(BadInput, match=r"built.json is not the record of a build: .*No such file"):
        built.read(tmp_path)


def page_of(folder: Path, *said: Summary | None) -> Page:
    found = matrix.read(written(folder))
    ran = [
        CellResult(cell, entry, entry.code if entry else 2, entry.reason if entry else "it fell over", 61.0)
        for cell, entry in zip(found.cells, said, strict=True)
    ]
    page = Page(found, ran, "2026-11-03T02:00:00Z", 120.0, folder)
    page.write()
    return page


def test_a_green_headline_counts_judged_and_unjudged_nights(tmp_path: Path) -> None:
    cells = matrix.read(written(tmp_path)).cells
    page = page_of(
        tmp_path, said_of(cells[0]), said_of(cells[1], reason="recorded, not judged: night 1"), said_of(cells[2])
    )
    assert page.code == 0
    assert list(page.lines()) == [
        "green: 3 nights on 2 boards: 2 within their gates, 1 recorded, not judged",
        "  ✓ tiny-qwen2 on virtual (emulated): green",
        "  ○ tiny-qwen2@s4 on virtual (emulated): recorded, not judged: night 1",
        "  ✓ tiny-qwen2 on ax650: green",
        "  - tiny-qwen2@s4 on ax650: excluded: not yet",
        f"  page: {tmp_path / 'matrix.html'}",
    ]


@pytest.mark.parametrize(("codes", "code"), [((0, 0, 0), 0), ((0, 1, 2), 1), ((0, 2, 2), 2), ((0, 0, 130), 1)])
def test_the_exit_code_is_of_the_worst(codes: Sequence[int], code: int, tmp_path: Path) -> None:
    cells = matrix.read(written(tmp_path)).cells
    assert page_of(tmp_path, *(said_of(cell, each) for cell, each in zip(cells, codes, strict=True))).code == code


def test_the_page_has_every_night_with_its_figures_gates_and_targets(tmp_path: Path) -> None:
    cells = matrix.read(written(tmp_path)).cells
    first = dataclasses.replace(said_of(cells[0], 1), report=str(tmp_path / "n@s4" / "report.html"))
    first.night["figures"]["mean_kld"] = 8e-6
    first = dataclasses.replace(
        first,
        judged=(
            *first.judged,
            Judged("peak_memory", "worse", "200 MB", "92 ± 18 MB"),
            Judged("load", "no gate", "1 s", ""),
        ),
    )
    page = page_of(tmp_path, first, None, said_of(cells[2]))
    html = (tmp_path / "matrix.html").read_text()
    outline = Outline(html)
    said = " ".join("".join(outline.text).split())
    assert outline.open == []
    assert page.headline == "red: 2 of 3 nights on 2 boards: tiny-qwen2 on virtual (emulated): it is slow (and 1 more)"
    assert f"<h1>{page.headline}</h1>" in html
    assert (
        "mean KL divergence from the checkpoint 8e-06 nats gate 8e-06 ± 4e-07 nats; target 1.00e-04 nats, goal: reached"
        in said
    )
    assert "peak memory ✗ 200 MB gate 92 ± 18 MB" in said
    assert said.index("peak memory") < said.index("mean KL")  # what is red comes first
    assert "load" not in said  # the host's clock
    assert "✗ not held it fell over" in said
    assert "- excluded not yet" in said
    assert [link["href"] for link in outline.of("a")] == ["n%40s4/report.html", "junit.xml", "matrix.json"]
    data = json.loads((tmp_path / "matrix.json").read_text())
    assert [entry["state"] for entry in data["nights"]] == ["red", "not held", "green"]
    assert data["excluded"] == [{"board": "ax650", "model": "tiny-qwen2@s4", "reason": "not yet"}]


def test_a_ci_system_sees_every_night(tmp_path: Path) -> None:
    cells = matrix.read(written(tmp_path)).cells
    page_of(tmp_path, said_of(cells[0], 1, reason=f"{HOSTILE}\x00"), None, said_of(cells[2]))
    suites = list(ElementTree.parse(tmp_path / "junit.xml").getroot())
    assert [suite.get("name") for suite in suites] == ["virtual (emulated)", "ax650"]
    keys = ("tests", "failures", "errors", "skipped")
    assert [[suite.get(key) for key in keys] for suite in suites] == [["2", "1", "1", "0"], ["2", "0", "0", "1"]]
    cases = [case for suite in suites for case in suite]
    assert [[child.tag for child in case] for case in cases] == [
        *(["failure", "system-out"], ["error", "system-out"], ["system-out"], ["skipped", "system-out"])
    ]
    assert (cases[0].find("failure") or cases[0][0]).get("message") == f"{HOSTILE}�"


def test_nothing_of_a_night_becomes_markup(tmp_path: Path) -> None:
    cells = matrix.read(written(tmp_path)).cells
    hostile = dataclasses.replace(
        said_of(cells[0], 1, reason=HOSTILE),
        judged=(Judged("mean_kld", "worse", HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        headline=f"red: {HOSTILE}",
    )
    page_of(tmp_path, hostile, None, None)
    outline = Outline((tmp_path / "matrix.html").read_text())
    assert outline.open == []
    assert not {tag for tag, _ in outline.seen} & {"script", "img", "link"}
    assert not [name for _, attributes in outline.seen for name in attributes if name.startswith("on")]
    assert "".join(outline.text).count("alert(1)") >= 6


def test_a_summary_comes_back_as_it_was(tmp_path: Path) -> None:
    cell = matrix.read(written(tmp_path)).cells[0]
    file = tmp_path / "summary.json"
    assert summary.read(file) is None
    file.write_text(json.dumps(dataclasses.asdict(said_of(cell, 1))))
    assert summary.read(file) == said_of(cell, 1)
    for text in ("[]", "{", '{"judged": [{}]}', '{"judged": []}'):
        file.write_text(text)
        with pytest.raises(BadInput, match="is not the summary of a night"):
            summary.read(file)


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """`invoke nightly --matrix` itself."""
    words = ["--matrix", str(folder / "matrix.toml"), "--out", str(folder / "out"), *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "invoke", "nightly", *words],
        cwd=ROOT,
        env={**os.environ, MARK: str(folder), "XDG_STATE_HOME": str(folder / "state")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def test_a_failed_build_fails_its_nights_without_reserving_boards(tmp_path: Path) -> None:
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\n')
    process = start(tmp_path, "--limit", "build=0.1")
    out, said = process.communicate(timeout=10 * SECONDS)
    lines = out.splitlines()
    why = "build: build did not end within 0 s; last output: "
    assert lines[0].startswith(f"red: 2 of 2 nights on 2 boards: tiny-qwen2 on virtual-2 (emulated): {why}"), said
    assert process.returncode == 1
    assert left(str(tmp_path)) == []
    assert "reserve" not in said
    assert "build package" not in said
    assert not (tmp_path / "state" / "axc" / "boards" / "virtual-2").exists()
    for board in ("virtual-2", "virtual-3"):
        (held,) = history.read(tmp_path / "out" / "nightly" / "history", board, "tiny-qwen2").nights
        assert (held.verdict, held.stage) == ("red", "build")
        assert f"[{board} tiny-qwen2] build failed after " in said
    (folder,) = (tmp_path / "out" / "nightly" / "matrix").iterdir()
    outline = Outline((folder / "matrix.html").read_text())
    reports = [folder / (link["href"] or "") for link in outline.of("a") if "report" in (link["href"] or "")]
    assert len(reports) == 2
    assert all(report.is_file() for report in reports)
    site = tmp_path / "out" / "nightly" / "history" / "site"
    assert "red: 2 of 2 boards and models: tiny-qwen2 on virtual-2" in (site / "index.html").read_text()
    assert len(list((site / "reports").rglob("*.html"))) == 2


def test_a_matrix_that_is_ended_leaves_nothing_running(tmp_path: Path) -> None:
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\n')
    process = start(tmp_path)
    assert process.stderr
    said: list[str] = []
    while not said or said[-1] != "[build tiny-qwen2 for AX650] build ...":
        said.append(process.stderr.readline().rstrip("\n"))
        assert process.poll() is None, said
    process.send_signal(signal.SIGTERM)
    out, rest = process.communicate(timeout=SECONDS)
    why = "not held: SIGTERM ended the matrix"
    assert out.startswith(f"red: 2 of 2 nights on 2 boards: tiny-qwen2 on virtual-2 (emulated): {why} (and 1 more)\n")
    assert "[build tiny-qwen2 for AX650] build interrupted after " in rest
    assert process.returncode == 2
    assert left(str(tmp_path)) == []


def test_a_matrix_and_a_board_do_not_go_together(tmp_path: Path) -> None:
    written(tmp_path)
    process = start(tmp_path, "--board", "virtual")
    out, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (2, "")
    assert "error: --board and --matrix exclude each other: a matrix names its boards" in said


def test_a_failed_update_of_the_site_is_only_a_note(tmp_path: Path) -> None:
    said: list[str] = []
    nights.update_site(tmp_path / "none", tmp_path, said.append)
    (note,) = said
    assert note.startswith(f"note: the site was not updated: no history in {tmp_path / 'none'}: name the folder")
    assert run_folder.new(tmp_path / "runs", "2026-11-03T02:00:00Z", 3).name == "20261103T020000Z"
    assert run_folder.new(tmp_path / "runs", "2026-11-03T02:00:00Z", 3).name == "20261103T020000Z-2"
    for day in range(4, 8):
        run_folder.new(tmp_path / "runs", f"2026-11-{day:02d}T02:00:00Z", 3)
    assert len(list((tmp_path / "runs").iterdir())) == 3
