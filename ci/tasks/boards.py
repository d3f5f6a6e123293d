"""Tasks of a board: the emulated one's switch, a release onto a board and back."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context

from board.errors import BadInput
from ci.tasks.common import MODEL, OUT, PROMPT, TELL, VENV, built, verb
from requirements.install import install


@verb
def cross(_: Context, board: str = "virtual", out: str = OUT or "out") -> None:
    """The runner and everything it needs, as aarch64 wheels for a board's Python."""
    install(VENV, "boards")
    from ci import place, wheelhouse
    from toolchain.inventory import decimal

    package = wheelhouse.cross(place.find(board).python, Path(out), TELL)
    wheels = sorted(package.wheels.iterdir())
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{package.folder}: {len(wheels)} wheels, {decimal(size)}; installed {decimal(package.listing.size)}")


@verb
def board_up(_: Context, board: str = "virtual", disk: str = "", fresh: bool = False) -> None:
    """Start an emulated arm64 board on this machine (root; Debian packages, cached), or switch a board's port on."""
    install(VENV, "boards")
    from ci import place, power, virtual_board

    found = place.find(board)
    if found.emulated:
        virtual_board.up(found, place.address(found), disk, fresh, TELL)
        return
    if disk or fresh:
        raise BadInput(f"{board} is a board of its own: --disk and --fresh are for the emulated one")
    with place.hold(found):
        power.up(found, TELL)


@verb
def board_down(_: Context, board: str = "virtual") -> None:
    """Cut a board's power: the emulated one's, whose disk stays, or by a board's port."""
    install(VENV, "boards")
    from ci import place, power, virtual_board

    found = place.find(board)
    if found.emulated:
        print(f"{found.name} is off" if virtual_board.down(found) else f"{found.name} was off already")
        return
    with place.hold(found):
        power.off(found)


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
    from ci import deploy, evidence, place, wheelhouse
    from toolchain.models import load_model

    spec, found = load_model(model), place.find(board)
    bundle = built(spec.name, out)
    with place.hold(found):

        def package() -> wheelhouse.Package:
            return wheelhouse.cross(found.python, Path(out), TELL)

        at, record = place.address(found), evidence.place(Path(out), found.name)
        deploy.deploy(found, at, package, bundle, prompt or spec.prompt, keep, TELL, record)


@verb
def rollback(_: Context, board: str = "virtual") -> None:
    """The release before the current one is current again."""
    install(VENV, "boards")
    from ci import deploy, place

    found = place.find(board)
    with place.hold(found):
        deploy.rollback(found, place.address(found), TELL)
