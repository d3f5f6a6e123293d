"""Tasks of nightly runs: run a night or a matrix, write the site, record gates."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from invoke.context import Context
from invoke.exceptions import Exit

from axrun.errors import BadInput
from ci.tasks.common import MODEL, MODEL_DIR, OUT, VENV, verb, within
from requirements.install import install


@verb
def nightly(
    _: Context,
    board: str = "",
    model: str = MODEL,
    model_dir: str = MODEL_DIR,
    bundle: str = "",
    out: str = OUT or "out",
    history: str = "",
    wait: int = 0,
    soak: bool = False,
    limit: Sequence[str] | None = None,
    retry: bool = True,
    bisect: bool = False,
    notify: str = os.environ.get("NIGHTLY_NOTIFY", ""),
    matrix: str = "",
    built: str = "",
    summary: str = "",
) -> None:
    """Nightly run: reserve a board, build, deploy, test, compare with the gates, release it, report green or red."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout begins with the verdict
        install(VENV, "boards", "reference", "test")
    from ci.nightly import nights
    from ci.nightly import summary as summaries
    from ci.nightly.night import nightly
    from ci.nightly.pipeline import Options, limits

    kept, checkpoint = _history(history, out), Path(model_dir).expanduser() if model_dir else None
    if matrix:
        if given := [name for name, value in (("--board", board), ("--bundle", bundle), ("--built", built)) if value]:
            raise BadInput(f"{given[0]} and --matrix exclude each other: a matrix names its boards and builds for them")
        flags = {"--no-retry": not retry, "--bisect": bisect, "--soak": soak}
        more = [*(flag for flag, given in flags.items() if given), f"--notify={notify}"]
        page = nights.run_matrix(Path(matrix), Path(out), kept, checkpoint, wait, limit or [], _tell, more)
        print("\n".join(page.lines()), flush=True)
        nights.update_site(kept, Path(out) / "nightly", _tell, page.matrix.targets)
        if page.code:
            raise Exit(code=page.code)
        return
    options = Options(
        board=board or "virtual",
        model=model or "tiny-qwen2",
        out=Path(out) / "nightly",
        history=kept,
        bundle=Path(bundle) if bundle else None,
        built=Path(built) if built else None,
        model_dir=checkpoint,
        wait=wait,
        soak=soak,
        limits=limits(limit or []),
        retry=retry,
        bisect=bisect,
        notify=notify,
    )
    held = nightly(options, _tell)
    if summary:
        summaries.write(Path(summary), held)
    print("\n".join(held.lines()), flush=True)
    if not built:  # a matrix updates the site once, after all its nights
        nights.update_site(kept, options.out, _tell)
    if held.verdict.code:
        raise Exit(code=held.verdict.code)


@verb
def site(
    _: Context,
    history: str = "",
    out: str = OUT or "out",
    into: str = "",
    targets: str = "",
) -> None:
    """Write the static site of a history of nights: verdicts, trends, targets, badges."""
    install(VENV, "boards", "reference")
    from ci.nightly import nights

    kept = _history(history, out)
    folder = Path(into) if into else kept / "site"
    print(nights.site(kept, Path(out) / "nightly", folder, Path(targets) if targets else None))


@verb
def gate_record(
    _: Context,
    board: str = "virtual",
    model: str = MODEL or "tiny-qwen2",
    maker: str = "cpu",
    nights: int = 5,
    out: str = OUT or "out",
    history: str = "",
) -> None:
    """Record the figures of the last nights as gates for the next ones."""
    install(VENV, "boards")
    from ci.nightly.night import record

    within("--nights", nights, 1, 10_000)
    print(record(board, model, maker, _history(history, out), nights))


def _history(given: str, out: str) -> Path:
    return Path(given or Path(out) / "nightly" / "history")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
