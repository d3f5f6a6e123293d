"""docs/benchmarks.md and the README's table, written from the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ci.benchmarks.results import Headline, Measured, Table

BEGIN, END = "<!-- benchmarks: written by `make bench REPORT=1` -->", "<!-- benchmarks end -->"
HEAD = """# Benchmarks

Written by `make bench REPORT=1` from [results.json](benchmarks/results.json); an edit by hand is lost, and a test
compares the two. Peers take turns with us in one run on the same machine: compare within a table, not across tables.
"""


def page(tables: Sequence[Table]) -> str:
    """The whole of docs/benchmarks.md."""
    return "\n".join([HEAD, *("\n".join(_section(table)) for table in tables)])


def _section(table: Table) -> Iterator[str]:
    yield f"## {table.title}\n"
    yield "\n".join(markdown(table.columns, table.rows)) + "\n"
    if table.bars:
        yield f"![{table.title}: {', '.join(table.bars)}](benchmarks/{plot_file(table)})\n"
    if table.note:
        yield f"{table.note}\n"
    seen = table.measured
    yield f"{seen.date}, {seen.machine}; {seen.versions}. `{seen.command}`\n"


def plot_file(table: Table) -> str:
    """The file of a table's plot, in docs/benchmarks."""
    return f"{table.name}.svg"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table with right-aligned numbers."""
    yield "| " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"


def readme(text: str, tables: Sequence[Table]) -> str:
    """The README with an updated table of headlines. Raises ValueError unless it has each marker once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md needs {BEGIN} and {END}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + "\n".join([BEGIN, *_headlines(tables), END]) + after


def _headlines(tables: Sequence[Table]) -> Iterator[str]:
    lines: list[Headline] = [line for table in tables for line in table.headlines]
    if not lines:
        return
    yield from markdown(("", "axc", "beside it", "ratio"), [(x.what, x.ours, x.peer, x.ratio) for x in lines])
    seen = sorted({_said(table.measured) for table in tables if table.headlines})
    yield ""
    yield "Measured with (all results, with plots: [docs/benchmarks.md](docs/benchmarks.md)):"
    yield ""
    yield from (f"* {said}" for said in seen)


def _said(measured: Measured) -> str:
    return f"{measured.date}, {measured.machine}, `{measured.command}`"
