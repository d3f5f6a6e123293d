"""The page of a matrix, its exit code, and what a CI system reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from axrun.errors import BadInput
from ci.nightly import matrix, summary
from ci.nightly.matrix_run import CellResult
from ci.nightly.report.matrix import Page
from ci.nightly.summary import Judged, Summary
from tests.ci.matrix.matrices import said_of, written
from tests.ci.test_report import HOSTILE, Outline


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
