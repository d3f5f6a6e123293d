"""Tasks of the nightly: hold a night, record gates."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from invoke.context import Context
from invoke.exceptions import Exit

from ci.tasks.common import MODEL, MODEL_DIR, OUT, VENV, verb
from requirements.install import install


@verb
def nightly(
    _: Context,
    board: str = "virtual",
    model: str = MODEL or "tiny-qwen2",
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
) -> None:
    """Hold a board, build, deploy, measure, judge by its gates, let go, report: green, or red with the reason."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout begins with the verdict
        install(VENV, "boards", "reference", "test")
    from ci.course import Options, limits
    from ci.nightly import nightly

    options = Options(
        board=board,
        model=model,
        out=Path(out) / "nightly",
        history=Path(history or Path(out) / "nightly" / "history"),
        bundle=Path(bundle) if bundle else None,
        model_dir=Path(model_dir).expanduser() if model_dir else None,
        wait=wait,
        soak=soak,
        limits=limits(limit or []),
        retry=retry,
        bisect=bisect,
        notify=notify,
    )
    held = nightly(options, lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(held.lines()), flush=True)
    if held.verdict.code:
        raise Exit(code=held.verdict.code)


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
    """What the last nights measured becomes what the next must measure."""
    install(VENV, "boards")
    from ci.nightly import record

    print(record(board, model, maker, Path(history or Path(out) / "nightly" / "history"), nights))
