"""Tasks of a board: the emulated one's switch, a release onto a board and back."""

from __future__ import annotations

import contextlib
import sys
from json import dumps
from pathlib import Path

from invoke.context import Context

from ci.tasks.common import MODEL, OUT, PROMPT, TELL, VENV, built, finish, verb
from requirements.install import install


@verb
def cross(_: Context, board: str = "virtual", out: str = OUT or "out") -> None:
    """The runner and everything it needs, as aarch64 wheels for a board's Python."""
    install(VENV, "boards")
    from ci import place, wheelhouse
    from toolchain.inventory import decimal

    package = wheelhouse.cross(place.find(board).python, Path(out))
    wheels = sorted(package.wheels.iterdir())
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{package.folder}: {len(wheels)} wheels, {decimal(size)}; installed {decimal(package.listing.size)}")


@verb
def board_up(_: Context, board: str = "virtual", disk: str = "", fresh: bool = False) -> None:
    """Start an emulated arm64 board on this machine (root; Debian packages, cached)."""
    install(VENV, "boards")
    from ci import place, virtual_board

    found = place.emulated(board)
    virtual_board.up(found, place.address(found), disk, fresh, TELL)


@verb
def board_down(_: Context, board: str = "virtual") -> None:
    """Cut the emulated board's power; its disk stays."""
    install(VENV, "boards")
    from ci import place, virtual_board

    found = place.emulated(board)
    print(f"{found.name} is off" if virtual_board.down(found) else f"{found.name} was off already")


@verb
def deploy(
    _: Context,
    board: str = "virtual",
    model: str = MODEL or "tiny-qwen2",
    prompt: str = PROMPT,
    out: str = OUT or "out",
    keep: int = 3,
) -> None:
    """Runner and bundle onto a board: sent, verified, asked, and only then switched to."""
    install(VENV, "boards")
    from ci import deploy, evidence, holding, place, wheelhouse
    from toolchain.models import load_model

    spec, found = load_model(model), place.find(board)
    bundle = built(spec.name, out)
    with holding.hold(found, f"deploy of {spec.name}", say=TELL) as held, holding.marked(held):
        package = wheelhouse.cross(found.python, Path(out))
        at, record = place.address(found), evidence.place(Path(out), found.name)
        deploy.deploy(found, at, package, bundle, prompt or spec.prompt, keep, TELL, record)


@verb
def board_doctor(_: Context, board: str = "virtual", model: str = "", json: bool = False) -> None:
    """Say what is wrong with the bundle on a board, and where: axrun doctor of its current release."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the report
        install(VENV, "boards")
    from ci import doctor, place

    found = place.find(board)
    if not json:
        TELL(f"examining what {found.name} has ...")
    report = doctor.on_board(found, place.address(found), model=model)
    print(dumps(report.json()) if json else "\n".join(report.lines()))
    finish(report.exit_code)


@verb
def rollback(_: Context, board: str = "virtual") -> None:
    """The release before the current one is current again."""
    install(VENV, "boards")
    from ci import deploy, holding, place

    found = place.find(board)
    with holding.hold(found, "rollback", say=TELL) as held, holding.marked(held):
        deploy.rollback(found, place.address(found), TELL)


@verb
def board_free(_: Context, board: str = "virtual") -> None:
    """Clear what a night or a deploy left that was killed: processes, lock, place, power, temporary files."""
    install(VENV, "boards")
    from ci import holding, place

    for line in holding.free(place.find(board)):
        TELL(line)
