"""`make bench REPORT=1`: a run's tables become docs/benchmarks.md, its plots and the README's table."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from axrun.errors import BadInput
from ci.benchmarks import page, plot, report, results

ROOT = Path(__file__).resolve().parents[2]
README = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"


def case(name: str, rows: list[list[str]], **more: Any) -> dict[str, Any]:
    table = {
        "name": name,
        "title": f"Of {name}",
        "columns": ["", "ax", "llama.cpp"],
        "rows": rows,
        "unit": "ms",
        **more,
    }
    return {"name": f"test_{name}", "extra_info": {"table": table}}


def run(folder: Path, *cases: dict[str, Any]) -> Path:
    machine = {"processor": "x86_64", "cpu": {"brand_raw": "A CPU", "count": 2}}
    path = folder / "run.json"
    path.write_text(json.dumps({"machine_info": machine, "datetime": "2026-11-26T10:00:00", "benchmarks": list(cases)}))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_a_second_run_keeps_tables_it_did_not_measure(tree: Path) -> None:
    line = ["decode", "1 ms", "llama.cpp 2 ms", "2.00x"]
    s8, s4 = [["s8 | decode", "1.0", "2.0"]], [["s4 decode", "0.5", ""]]
    first = run(
        tree,
        case("engine", s8, bars=["ax", "llama.cpp"], headlines=[line]),
        case("engine", s4, bars=["ax", "llama.cpp"]),
    )
    report.publish(first, "make bench REPORT=1", "axc 1", tree)
    report.publish(run(tree, case("load", [["ax", "3", "4"]])), "make bench REPORT=1 ARGS='-k load'", "axc 2", tree)

    written = (tree / "docs" / "benchmarks.md").read_text()
    assert [line for line in written.splitlines() if line.startswith("## ")] == ["## Of engine", "## Of load"]
    assert r"| s8 \| decode | 1.0 | 2.0 |" in written
    assert "| s4 decode | 0.5 |  |" in written
    assert "2026-11-26, A CPU, 2 cores; axc 1. `make bench REPORT=1`" in written
    assert "axc 2. `make bench REPORT=1 ARGS='-k load'`" in written
    text = (tree / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| decode | 1 ms | llama.cpp 2 ms | 2.00x |" in text
    assert [path.name for path in (tree / "docs" / "benchmarks").iterdir() if path.suffix == ".svg"] == ["engine.svg"]


def test_a_plot_has_the_same_bytes_again_and_says_every_number(tmp_path: Path) -> None:
    measured = results.Measured("2026-11-26", "A CPU", "axc 1", "make bench REPORT=1")
    rows = (("s8", "20.9 ms", "1.46x"), ("s4", "13.6 ms", ""))
    table = results.Table("engine", "Engine", ("", "ax", "ratio"), rows, measured, unit="ms", bars=("ax", "ratio"))
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    plot.draw(table, first)
    plot.draw(table, second)
    assert first.read_bytes() == second.read_bytes()
    words = {
        "".join(element.itertext()).strip() for element in ET.parse(first).iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"s8", "s4", "ax", "ratio", "20.9", "13.6", "1.46"} <= words


@pytest.mark.parametrize(
    ("text", "number"), [("1.46x", 1.46), ("1,024 ms", 1024.0), ("", None), ("none", None), ("97.3%", 97.3)]
)
def test_the_number_of_a_cell(text: str, number: float | None) -> None:
    assert plot.number(text) == number


def test_a_run_without_tables_changes_nothing(tree: Path) -> None:
    with pytest.raises(BadInput, match="has a table"):
        report.publish(run(tree, {"name": "test_x", "extra_info": {}}), "make bench", "axc 1", tree)
    assert (tree / "README.md").read_text() == README
    assert not (tree / "docs" / "benchmarks.md").exists()


def test_results_edited_by_hand_are_named(tree: Path) -> None:
    record = tree / "docs" / "results.json"
    record.write_text('{"engine": {"title": "Engine"}}')
    with pytest.raises(BadInput, match=r"results\.json is not what `make bench REPORT=1` writes"):
        results.load(record)


def test_page_and_readme_match_the_results() -> None:
    tables = results.load(ROOT / "docs" / "benchmarks" / "results.json")
    assert tables
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf-8") == page.page(tables)
    text = (ROOT / "README.md").read_text("utf-8")
    assert page.readme(text, tables) == text
    drawn = {path.name for path in (ROOT / "docs" / "benchmarks").glob("*.svg")}
    assert drawn == {page.plot_file(table) for table in tables if table.bars}
