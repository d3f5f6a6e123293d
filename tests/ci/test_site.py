"""The site: complete, immune to the history's content, deterministic, and usable from any folder."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from axrun.errors import BadInput
from ci.nightly import history, metrics, targets
from ci.nightly.history import Night
from ci.nightly.report import badge, chart, site, state
from ci.nightly.targets import Target
from tests.ci.test_history import night
from tests.ci.test_report import HOSTILE, Outline

ROOT = Path(__file__).resolve().parents[2]
FETCHED = {"src", "xlink:href", "action", "data", "background", "srcset", "poster"}
GOALS = (
    Target("ax650", "qwen2-0.5b", "ttft_128", 129.16, "ms", "published", "a vendor's log"),
    Target("virtual", "tiny-qwen2", "mean_kld", 1e-4, "nats", "goal", "ours"),
)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A year of nights of three boards and models, one of them in another weight type."""
    folder = tmp_path / "history"
    gates = {"mean_kld": "8e-6 ± 4e-7 nats", "decode_128": "22 ± 3 token/s"}
    for month in range(1, 13):
        for day in range(1, 29, 4):
            figures = {"mean_kld": 8e-6 + day * 1e-9, "decode_128": 20.0 + day % 3, "ttft_128": 150.0}
            red = day == 13
            held = night(1, figures=figures, gates=gates if month > 2 else {}, verdict="red" if red else "green")
            history.append(
                folder, again(held, started=f"2026-{month:02d}-{day:02d}T02:00:00Z", reason="x" if red else "")
            )
    history.append(folder, night(20, board="ax650", model="qwen2-0.5b", figures={"ttft_128": 125.0}, maker="pulsar2"))
    history.append(folder, night(20, model="tiny-qwen2@s4", verdict="red", reason="deploy: no room", figures={}))
    return folder


def again(held: Night, **other: object) -> Night:
    return dataclasses.replace(held, **other)  # type: ignore[arg-type]


def made(folder: Path, out: Path, reports: Path | None = None) -> dict[str, bytes]:
    site.write(site.collect(folder, reports, GOALS), out)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def pages(out: Path) -> Iterator[tuple[Path, Outline]]:
    for path in sorted(out.rglob("*.html")):
        if "reports" not in path.parts:
            yield path, Outline(path.read_text())


def text(outline: Outline) -> str:
    return " ".join("".join(outline.text).split())


def test_every_link_leads_to_a_file_and_nothing_is_fetched(kept: Path, tmp_path: Path) -> None:
    report = tmp_path / "nightly" / "virtual" / "nights" / "tiny-qwen2" / "20261201T020000Z" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("<!doctype html><title>a report</title>")
    out = tmp_path / "site"
    names = set(made(kept, out, tmp_path / "nightly"))
    assert "reports/virtual/tiny-qwen2/20261201T020000Z.html" in names
    linked = set()
    for path, outline in pages(out):
        assert outline.open == []
        assert not {tag for tag, _ in outline.seen} & {"script", "link", "iframe", "object", "embed", "img", "form"}
        assert not [name for _, attributes in outline.seen for name in attributes if name in FETCHED]
        assert outline.of("meta")[2]["content"] == "default-src 'none'; style-src 'unsafe-inline'"
        ids = [attributes["id"] for _, attributes in outline.seen if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert "url(" not in path.read_text()
        for attributes in outline.of("a"):
            link = unquote(attributes["href"] or "")
            assert not re.match("[a-z]+:|/|//", link)
            target = (path.parent / link).resolve()
            assert target.is_file()
            linked.add(target.relative_to(out.resolve()).as_posix())
    assert names - linked <= {".lock", ".site.json"}  # and everything is linked to


def test_the_index_says_how_each_board_and_model_stands(kept: Path, tmp_path: Path) -> None:
    made(kept, tmp_path / "site")
    outline = Outline((tmp_path / "site" / "index.html").read_text())
    said = text(outline)
    assert "red: 1 of 3 boards and models: tiny-qwen2@s4 on virtual (emulated): deploy: no room" in said
    assert "tiny-qwen2 on virtual (emulated)" in said
    assert "qwen2-0.5b on ax650" in said
    assert "✗ red deploy: no room" in said
    assert "green for 3 nights" in said
    assert "2026-12-25T02:00:00Z" in said
    assert [attributes for attributes in outline.of("th") if attributes.get("scope") not in ("col", "row")] == []


def test_targets_are_shown_only_with_figures_of_their_board(kept: Path, tmp_path: Path) -> None:
    made(kept, tmp_path / "site")
    said = text(Outline((tmp_path / "site" / "index.html").read_text()))
    assert "125 ms measured on the board, pulsar2 bundle, 2026-11-20 ≤ 129.2 ms ✓ reached" in said
    assert "published, not measured here: a vendor's log" in said
    assert "measured on the emulated board, cpu bundle, 2026-12-25 ≤ 1.00e-04 nats ✓ reached a goal: ours" in said
    emulated = text(Outline((tmp_path / "site" / "virtual" / "tiny-qwen2.html").read_text()))
    assert "129.2" not in emulated  # a real board's
    assert "say nothing about a real board" in emulated
    drawn = (tmp_path / "site" / "ax650" / "qwen2-0.5b.html").read_text()
    assert '<line class="target"' in drawn
    assert "129.2 ms, published: a vendor&#39;s log" in drawn


def test_a_target_without_nights_is_shown(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    made(tmp_path / "history", tmp_path / "site")
    said = text(Outline((tmp_path / "site" / "index.html").read_text()))
    assert "no nights yet" in said
    assert "qwen2-0.5b on ax650 first token of a prompt of 128 not yet ≤ 129.2 ms" in said


def test_charts_show_all_nights_over_the_gates_of_their_time(kept: Path) -> None:
    series = next(entry for entry in site.collect(kept).series if entry.model == "tiny-qwen2")
    drawn = series.chart("cpu", "decode_128")
    assert drawn is not None
    assert len(drawn.points) == len(series.nights) == 84
    assert sum(not point.green for point in drawn.points) == 12
    (step,) = drawn.steps  # gates came after two months, and are the same since
    assert step.text == "gate 22 ± 3 token/s"
    assert drawn.points[13].x < step.x < drawn.points[14].x
    assert step.x + step.width == pytest.approx(drawn.points[-1].x, abs=0.2)
    per_unit = (drawn.points[0].y - drawn.points[1].y) / (series.nights[1].figures["decode_128"] - 21.0 or 1)
    assert step.height == pytest.approx(6 * abs(per_unit), rel=0.1)
    assert drawn.summary.startswith("decode behind 128, 84 nights from 2026-01-01 to 2026-12-25: least 20 token/s")


def test_gates_that_changed_are_steps() -> None:
    texts = ["20 ± 1 token/s", "20 ± 1 token/s", "", "30 ± 2 token/s", "no number ± x", "1e400 ± 1 x"]
    held = [site.bounds(entry) for entry in texts]
    assert [entry and (entry.least, entry.most) for entry in held] == [(19, 21), (19, 21), None, (28, 32), None, None]
    nights = [night(n + 1, figures={"decode_128": 20.0}) for n in range(6)]
    drawn = chart.trend(metrics.find("decode_128"), nights, held, [])
    assert [step.text for step in drawn.steps] == ["gate 20 ± 1 token/s", "gate 30 ± 2 token/s"]
    one = chart.trend(metrics.find("decode_128"), nights[:1], held[:1], [])
    assert (one.steps[0].x, one.steps[0].width) == (chart.LEFT, chart.WIDTH - chart.LEFT - chart.RIGHT)


def test_nothing_of_a_history_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / "history"
    hostile: dict[str, object] = {
        "reason": HOSTILE,
        "stage": HOSTILE,
        "maker": HOSTILE,
        "engine": HOSTILE,
        "release": HOSTILE,
        "machine": {HOSTILE: HOSTILE},
        "gates": {"decode_128": HOSTILE},
        "verdict": "red",
    }
    history.append(folder, night(1, pins={HOSTILE: "1"}, **hostile))
    history.append(folder, night(2, pins={HOSTILE: HOSTILE}, **hostile))
    with (folder / "virtual" / "tiny-qwen2.jsonl").open("a") as file:
        file.write(HOSTILE + "\n")
    made(folder, tmp_path / "site")
    shown = 0
    for path, outline in pages(tmp_path / "site"):
        assert outline.open == []
        assert not {tag for tag, _ in outline.seen} & {"script", "img"}
        assert not [name for _, attributes in outline.seen for name in attributes if name.startswith("on")]
        shown += "".join(outline.text).count("alert(1)")
        for drawing in re.findall("(?s)<svg.*?</svg>", path.read_text()):
            ElementTree.fromstring(drawing)
    assert shown >= 10
    for path in (tmp_path / "site").rglob("*.svg"):
        assert {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()} <= {
            *("svg", "title", "clipPath", "rect", "g", "text")
        }
    assert HOSTILE in json.loads((tmp_path / "site" / "nights.json").read_text())["boards"][0]["nights"][0]["reason"]


def test_invalid_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    file = history.append(tmp_path / "history", night(1))
    whole = json.loads(file.read_text())
    needed = {key: whole[key] for key in ("schema", "board", "model", "started", "seconds", "verdict", "reason")}
    lines = [
        json.dumps(needed),  # as the first version wrote them
        json.dumps({**whole, "figures": {"decode_128": float("nan")}}),
        json.dumps({**whole, "figures": {"decode_128": 1e300, "mean_kld": -1e300}}),
        json.dumps({key: value for key, value in whole.items() if key != "verdict"}),
        json.dumps({**whole, "schema": 2}),
        '{"torn',
    ]
    file.write_text("\n".join(lines) + "\n")
    for name in ("virtual/NO NAME.jsonl", "..x/tiny-qwen2.jsonl", "virtual/notes.txt"):
        (tmp_path / "history" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "history" / name).write_text(json.dumps(whole))
    found = site.collect(tmp_path / "history")
    (series,) = found.series
    assert len(series.nights) == 1
    assert [fault.partition(" is ")[0] for fault in series.faults] == [
        f"tiny-qwen2.jsonl line {n}" for n in (2, 3, 4, 5, 6)
    ]
    assert series.charts("cpu") == []
    made(tmp_path / "history", tmp_path / "site")
    said = text(Outline((tmp_path / "site" / "virtual" / "tiny-qwen2.html").read_text()))
    assert "line 2 is skipped: it has NaN, which is not a JSON number" in said


def test_optional_fields_are_shown_where_a_night_has_them(tmp_path: Path) -> None:
    more = {
        "flaky": "ssh: connection reset",
        "quarantined": {"figure load": "a user until 2026-12-31: a slow disk"},
        "culprit": "5b2a0a6 engine: a commit",
    }
    richer = night(1, verdict="red", reason="it is slow", **more)
    assert state.of(richer) == state.FLAKY_RED
    assert state.of(night(1, flaky="ssh: connection reset")) == state.FLAKY_GREEN
    assert state.of(night(1, quarantined=more["quarantined"])) == state.QUARANTINED
    assert state.remarks(richer) == [
        "first try: ssh: connection reset",
        "in quarantine: figure load: a user until 2026-12-31: a slow disk",
        "culprit: 5b2a0a6 engine: a commit",
    ]
    history.append(tmp_path / "richer", richer)
    made(tmp_path / "richer", tmp_path / "site")
    said = text(Outline((tmp_path / "site" / "virtual" / "tiny-qwen2.html").read_text()))
    assert "✗ red, flaky" in said
    assert all(remark in said for remark in state.remarks(richer))
    assert state.of(night(1)) == state.GREEN
    assert state.of(night(1, reason="no gates")) == state.UNJUDGED
    verdicts = [night(1), night(2), night(3, reason="no gates"), night(4, reason="no gates"), night(5, verdict="red")]
    assert [state.streak(verdicts[:count]) for count in (2, 4, 5)] == [("green", 2), ("not judged", 2), ("red", 1)]


def test_the_site_is_deterministic_and_removes_obsolete_files(kept: Path, tmp_path: Path) -> None:
    first, second = made(kept, tmp_path / "one"), made(kept, tmp_path / "two")
    assert first == second
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.html")}
    (tmp_path / "one" / "CNAME").write_text("nights.example.org")  # somebody else's
    assert {**first, "CNAME": b"nights.example.org"} == made(kept, tmp_path / "one")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    (kept / "ax650" / "qwen2-0.5b.jsonl").unlink()
    third = made(kept, tmp_path / "one")
    assert set(first) - set(third) == {"ax650/qwen2-0.5b.html", "badges/ax650/qwen2-0.5b.svg"}
    assert "CNAME" in third


def test_a_folder_of_other_things_is_left_alone(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(BadInput, match=r"has files that are not the site's \(history\): use a separate"):
        site.write(site.collect(kept), tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"
    with pytest.raises(BadInput, match="no history in "):
        site.collect(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write the site in .*file"):
        site.write(site.collect(kept), tmp_path / "file")


def test_a_record_does_not_lead_elsewhere(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    out = tmp_path / "site"
    made(kept, out)
    (out / ".site.json").write_text(json.dumps(["../precious", "/etc/hostname", 3, "index.html"]))
    made(kept, out)
    assert (tmp_path / "precious").read_text() == "kept"


def test_the_task_writes_it(kept: Path, tmp_path: Path) -> None:
    words = ["invoke", "site", "--history", str(kept), "--into", str(tmp_path / "site"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(tmp_path / "site" / "index.html"))
    words[3] = str(tmp_path / "none")
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"error: no history in {tmp_path / 'none'}: " in done.stderr


def test_an_axis_tells_its_ends_apart() -> None:
    nights = [night(n + 1, figures={"decode_128": 130.94 + n / 100}) for n in range(3)]
    drawn = chart.trend(metrics.find("decode_128"), nights, [None] * 3, [])
    assert [tick.text for tick in drawn.y_ticks] == ["130.94", "130.95", "130.96"]


def test_a_badge_is_an_image_that_says_itself() -> None:
    drawn = badge.svg("tiny-qwen2@s4 on virtual (emulated)", "red for 2 nights <&>\x1b", "bad")
    tree = ElementTree.fromstring(drawn)
    assert tree.get("role") == "img"
    assert tree.get("aria-label") == "tiny-qwen2@s4 on virtual (emulated): red for 2 nights <&>�"
    boxes = [element for element in tree.iter() if element.tag.endswith("rect")][1:]
    assert sum(int(box.get("width") or 0) for box in boxes) == int(tree.get("width") or 0)
    for colour in badge.COLOURS.values():
        assert contrast(colour, "#ffffff") >= 4.5


def contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio"""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_contrast_is_sufficient_in_light_and_dark_mode() -> None:
    css = (Path(site.__file__).parent / "page.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", css, re.S):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        for ink in ("ink", "soft", "good", "bad", "line"):
            for paper in ("paper", "card", *([f"{ink}-wash"] if ink in ("good", "bad") else [])):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def test_the_shipped_targets_are_valid() -> None:
    found = targets.read()
    assert {(entry.board, entry.basis) for entry in found} >= {("ax650", "published"), ("ax630c", "published")}
    assert targets.nearest(found[:2], 125.0) == found[1]  # 129.16 is reached, 122 is not
    assert targets.nearest(found[:2], 100.0) == found[0]
    assert targets.nearest(found[:2], 500.0) == found[1]
    assert targets.nearest((), 1.0) is None


TARGET = """# a comment
[[target]]
board = "ax650"
model = "qwen2-0.5b"
figure = "ttft_128"
value = 122.0
unit = "ms"
basis = "published"
source = "somebody"

[[target]]
board = "ax650"
model = "qwen2-0.5b"
figure = "decode_128"
value = 29
unit = "token/s"
basis = "goal"
source = "ours"
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('unit = "token/s"', 'unit = "ms"', "line 16: unit is 'ms', expected 'token/s'"),
        ("value = 29", "value = nan", "line 15: value is nan, expected a number"),
        ("value = 29", "value = true", "line 15: value is True, expected a number"),
        ('basis = "goal"', 'basis = "measured"', "line 17: basis is 'measured', expected 'published' or 'goal'"),
        ('figure = "decode_128"', 'figure = "decade_128"', "line 14: no figure is named 'decade_128'"),
        (
            'value = 29\nunit = "token/s"',
            'value = 29\nunits = "x"',
            "line 16: 'units' is not known: a target has board",
        ),
        ('source = "ours"\n', "", "line 11: this target has no source"),
        ("# a comment", "other = 1", "line 1: 'other' is not known: expected [[target]]"),
        ('board = "ax650"', 'board = "virtual"', "line 5: virtual is emulated, and first token of a prompt of 128"),
        ('model = "qwen2-0.5b"', 'model = "qwen3"', "line 4: no model is named 'qwen3'"),
        ("[[target]]", "[target", "Expected ']' at the end of a table declaration (at line 2"),
    ],
)
def test_an_error_in_targets_names_its_line(old: str, new: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "targets.toml"
    file.write_text(TARGET.replace(old, new))
    with pytest.raises(BadInput) as caught:
        targets.read(file)
    assert told in str(caught.value)
    assert str(file) in str(caught.value)
