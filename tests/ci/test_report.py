"""The report: complete, self-contained, and immune to text from a board."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ci.nightly import gate, metrics
from ci.nightly.gate import Gate
from ci.nightly.history import Night
from ci.nightly.report import changes, chart, heat
from ci.nightly.report.page import Page, render
from ci.nightly.stage import Stage
from tests.ci.test_history import night

VOID = {"meta", "br", "img", "input", "link", "hr"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}"
GATES = {
    "mean_kld": Gate(8e-6, 4e-7, "nats", "measured", "5 nights"),
    "decode_128": Gate(22.0, 3.0, "token/s", "published", "a vendor"),
    "load": Gate(1.0, 0.5, "s", "measured", "5 nights"),
}


class Outline(HTMLParser):
    """Tags that were opened and closed, attributes, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def stages(folder: Path, said: str = "fine") -> list[Stage]:
    (folder / "build.log").write_text(said)
    (folder / "measure.log").write_text(said)
    return [
        Stage("build", 0, 12.3, 600, "", folder / "build.log"),
        Stage("measure", 1, 45.6, 600, said[:100], folder / "measure.log"),
    ]


def page(folder: Path, said: str = "fine") -> Page:
    earlier = [night(n, figures={"mean_kld": 8e-6, "decode_128": 20.0 + n % 3}) for n in range(1, 25)]
    figures = {"mean_kld": 0.031, "decode_128": 22.5, "ttft_128": 160.0}
    layers = {
        f"layer {n} {stage}": [1 - 10 ** (-6 + n / 4), 10 ** (-4 + n / 8)]
        for n in range(12)
        for stage in ("prefill", "decode")
    }
    now = night(
        25,
        verdict="red",
        reason=said,
        figures=figures,
        layers={**layers, "post logits": [0.99998, 0.003]},
        machine={"cpu": said, "python": "3.9.2"},
        engine=said[:40],
        commit="36dd881",
    )
    judged = gate.judge(figures, GATES)
    green = earlier[-1]
    return Page(
        night=now,
        board="virtual (emulated)",
        headline=f"red: {said}",
        advice=said,
        stages=stages(folder, said),
        judgements=judged,
        nights=[*earlier, now],
        last_green=green,
        changes=changes.Changes(green, ((said[:7], said),), said, ((said, said, said),)),
        notes=[said],
        artifacts=[("junit.xml", said)],
    )


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    outline = Outline(render(page(tmp_path)))
    assert outline.open == []
    assert not {tag for tag, _ in outline.seen} & {"script", "link", "iframe", "object", "embed", "img", "form"}
    fetched = {"src", "href", "xlink:href", "action", "data", "background", "srcset"}
    assert not [name for _, attributes in outline.seen for name in attributes if name in fetched]
    style = re.search("(?s)<style>.*?</style>", render(page(tmp_path)))
    assert style
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert outline.of("meta")[2]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_nothing_that_came_from_elsewhere_becomes_markup(tmp_path: Path) -> None:
    outline = Outline(render(page(tmp_path, HOSTILE)))
    assert outline.open == []
    assert not {tag for tag, _ in outline.seen} & {"script", "img"}
    assert not [name for _, attributes in outline.seen for name in attributes if name.startswith("on")]
    assert "".join(outline.text).count("alert(1)") >= 12  # shown, as the text that it is
    assert "{{7*7}}" in "".join(outline.text)


def test_the_verdict_comes_first_and_in_words(tmp_path: Path) -> None:
    html = render(page(tmp_path, "it is slow"))
    outline = Outline(html)
    first = next(text.strip() for text in outline.text[outline.text.index("red: it is slow") :] if text.strip())
    assert first == "red: it is slow"
    text = " ".join("".join(outline.text).split())
    assert "✗ worse" in text  # not by colour alone
    assert "✓ within" in text
    assert "published, not measured here: a vendor" in text
    assert "✗ not measured" in text
    assert outline.of("html") == [{"lang": "en"}]


def test_flaky_quarantined_and_culprit_are_shown_as_text(tmp_path: Path) -> None:
    shown = page(tmp_path)
    now = replace(
        shown.night, flaky=f"deploy: {HOSTILE}", culprit=f"abc1234 {HOSTILE}", quarantined={"stage x": HOSTILE}
    )
    judgements = [replace(entry, outcome="quarantined") for entry in shown.judgements]
    tried = [replace(entry, excused="retried" if entry.code else "") for entry in shown.stages]
    html = render(replace(shown, night=now, nights=[*shown.nights[:-1], now], judgements=judgements, stages=tried))
    outline = Outline(html)
    text = " ".join("".join(outline.text).split())
    assert not {tag for tag, _ in outline.seen} & {"script", "img"}
    for words in (
        "! quarantined",
        "! retried",
        "first attempt",
        "red since the commit",
        "abc1234",
        "; quarantined: stage x",
    ):
        assert words in text


def test_each_chart_has_a_text_summary(tmp_path: Path) -> None:
    html = render(page(tmp_path))
    drawings = re.findall("(?s)<svg.*?</svg>", html)
    assert len(drawings) == 3  # of the figures that were measured on some night
    for drawing in drawings:
        tree = ElementTree.fromstring(drawing)
        assert tree.get("role") == "img"
        assert re.match(
            r".+, \d+ nights from 2026-11-\d\d to 2026-11-25: least .+, most .+, latest .+",
            tree.get("aria-label") or "",
        )


def test_a_chart_shows_every_night_and_the_gate_to_scale() -> None:
    metric, bounds = metrics.find("decode_128"), Gate(20.0, 2.0, "token/s", "measured", "nights")
    values = [20.0, 21.0, 19.0, 25.0]
    nights = [night(n + 1, figures={"decode_128": value}) for n, value in enumerate(values)]
    nights[3] = night(4, figures={"decode_128": 25.0}, verdict="red")
    drawn = chart.draw(metric, [nights[0], night(9, figures={}), *nights[1:]], bounds)
    assert drawn is not None
    assert [point.green for point in drawn.points] == [True, True, True, False]
    assert [point.latest for point in drawn.points] == [False, False, False, True]
    per_unit = (drawn.points[2].y - drawn.points[1].y) / 2
    assert per_unit > 0  # up is more
    assert drawn.points[0].y - drawn.points[3].y == pytest.approx(5 * per_unit, abs=0.3)
    assert drawn.band is not None
    top, height = drawn.band
    assert top == pytest.approx(drawn.points[0].y - 2 * per_unit, abs=0.3)
    assert height == pytest.approx(4 * per_unit, abs=0.3)
    assert drawn.expected == drawn.points[0].y
    assert all(chart.TOP <= point.y <= chart.HEIGHT - chart.BOTTOM for point in drawn.points)
    assert [tick.text for tick in drawn.y_ticks] == ["18", "21.5", "25"]


@pytest.mark.parametrize("values", [[0.0], [5.0], [5.0, 5.0], [-1.0, 1.0], [1e-9, 1e9]])
@pytest.mark.parametrize("bounds", [None, Gate(0.0, 0.0, "nats", "measured", "nights")])
def test_any_values_can_be_drawn(values: list[float], bounds: Gate | None) -> None:
    nights = [night(n + 1, figures={"mean_kld": value}) for n, value in enumerate(values)]
    drawn = chart.draw(metrics.find("mean_kld"), nights, bounds)
    assert drawn is not None
    assert all(0 <= point.x <= chart.WIDTH and 0 <= point.y <= chart.HEIGHT for point in drawn.points)


def test_a_figure_that_no_night_measured_is_not_drawn() -> None:
    assert chart.draw(metrics.find("load"), [night(1)], None) is None


def test_the_heat_map_has_a_row_for_each_part_and_darkens_with_the_error() -> None:
    layers = {
        **{
            f"layer {n} {stage}": [1 - 10.0 ** -(7 - n), 10.0 ** -(7 - n)]
            for n in range(11)
            for stage in ("prefill", "decode")
        },
        "post logits": [0.5, 0.2],
    }
    before = {**layers, "layer 3 decode": [1 - 2e-4, 1e-4]}
    rows = heat.rows(layers, before)
    assert [row.part for row in rows] == [*(f"layer {n}" for n in range(11)), "post"]
    shades = [row.cells[1].shade for row in rows[:11] if row.cells[1]]
    assert shades[0] == 0
    assert shades == sorted(shades)
    assert shades[-1] == heat.STEPS - 1
    assert [cell and cell.was for cell in rows[3].cells] == ["", "", "2.0e-04", ""]
    assert rows[-1].cells[2:] == (None, None)  # post has no decode of its own
    assert heat.rows({}, before) == ()


def test_changes_between_nights_are_found(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    old = git("rev-parse", "HEAD")
    git("commit", "-q", "--allow-empty", "-m", "second: <b> & 'quotes'")
    new = git("rev-parse", "HEAD")
    before = night(
        1, commit=old, pins={"numpy": "2.4.0", "gone": "1"}, files={"a": "1", "b": "2", "reference.npz": "3"}
    )
    after = night(
        2,
        commit=new + "+",
        pins={"numpy": "2.4.1", "come": "2"},
        files={"a": "1", "b": "9", "reference.npz": "4"},
        machine={"cpu": "Cortex-A55"},
        engine="ort 1.31.1",
    )
    found = changes.between(before, after, tmp_path)
    assert found.commits == ((git("rev-parse", "--short", new), "second: <b> & 'quotes'"),)
    assert found.note == "the working tree has uncommitted changes"
    assert found.others == (
        ("requirement come", "none", "2"),
        ("requirement gone", "1", "none"),
        ("requirement numpy", "2.4.0", "2.4.1"),
        ("engine", "none", "ort 1.31.1"),
        ("bundle", "3 files", "2 of 3 with other bytes: b, reference.npz"),
    )
    assert changes.other_bytes(before, after) == ["b"]
    assert changes.between(before, before, tmp_path).none
    lost = changes.between(night(1, commit="1" * 40), after, tmp_path)
    assert "some are missing in this clone; fetch them" in lost.note


def test_a_night_that_measured_nothing_has_a_page_too(tmp_path: Path) -> None:
    first = Night("virtual", "tiny-qwen2", "2026-11-01T02:00:00Z", 3.0, "red", "the place is locked by another")
    shown = Page(
        night=first,
        board="virtual (emulated)",
        headline="red: tiny-qwen2 on virtual: the place is locked by another",
        advice="",
        stages=[],
        judgements=[],
        nights=[first],
        last_green=None,
        changes=None,
        notes=[],
        artifacts=[],
    )
    outline = Outline(render(shown))
    text = " ".join("".join(outline.text).split())
    assert outline.open == []
    assert "There has been no green night yet." in text
    assert "Not measured: the night ended earlier." in text
