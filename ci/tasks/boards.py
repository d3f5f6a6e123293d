"""Tasks of boards: power, deploy and rollback, status, shell, and the runner on a board."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context

from axrun.errors import BadInput
from ci.tasks.common import ARGS, MODEL, OUT, PROMPT, TELL, VENV, built, finish, split, succeed, verb, within
from requirements.install import install

if TYPE_CHECKING:
    from ci.device.place import Address, Board


@verb
def cross(_: Context, board: str = "virtual", out: str = OUT or "out") -> None:
    """Package the runner and its dependencies as aarch64 wheels for a board's Python."""
    install(VENV, "boards")
    from axc.inventory import decimal
    from ci.device import place, wheelhouse

    package = wheelhouse.cross(place.find(board).python, Path(out), TELL)
    wheels = sorted(package.wheels.iterdir())
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{package.folder}: {len(wheels)} wheels, {decimal(size)}; installed {decimal(package.listing.size)}")


@verb
def board_up(
    _: Context, board: str = "virtual", disk: str = "", fresh: bool = False, even_if_held: bool = False
) -> None:
    """Start an emulated arm64 board on this machine (needs root), or switch a board's power port on."""
    install(VENV, "boards")
    from ci.device import holding, place, power, virtual_board

    found = place.find(board)
    if (disk or fresh) and not found.emulated:
        raise BadInput(f"{board} is a real board: --disk and --fresh are for the emulated one")
    with holding.alone(found, even_if_held, TELL):
        if found.emulated:
            virtual_board.up(found, place.address(found), disk, fresh, TELL)
        else:
            power.up(found, TELL)


@verb
def board_down(_: Context, board: str = "virtual", even_if_held: bool = False) -> None:
    """Switch a board off: stop the emulated one (its disk stays), or switch a board's power port off."""
    install(VENV, "boards")
    from ci.device import holding, place, power, virtual_board

    found = place.find(board)
    with holding.alone(found, even_if_held, TELL):
        if found.emulated:
            print(f"{found.name} is off" if virtual_board.down(found) else f"{found.name} was already off")
        else:
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
    """Deploy runner and bundle to a board: transfer, verify, run a prompt, then switch to the new release."""
    install(VENV, "boards")
    from axc.models import find_model
    from ci.device import deploy, evidence, holding, place, wheelhouse

    within("--keep", keep, 1, 1000)
    spec, found = find_model(model), place.find(board)
    bundle = built(spec, out)
    with holding.hold(found, f"deploy of {spec.name}", say=TELL) as held, holding.marked(held):

        def package() -> wheelhouse.Package:
            return wheelhouse.cross(found.python, Path(out), TELL)

        at, record = place.address(found), evidence.place(Path(out), found.name)
        deploy.deploy(found, at, package, bundle, prompt or spec.prompt, keep, TELL, record)


@verb
def board_doctor(
    _: Context, board: str = "virtual", model: str = "", json: bool = False, even_if_held: bool = False
) -> None:
    """Diagnose the bundle on a board: axrun doctor of its current release."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the report
        install(VENV, "boards")
    from ci.device import doctor, holding, place

    found = place.find(board)
    with holding.alone(found, even_if_held, _warn):
        if not json:
            TELL(f"examining the bundle on {found.name} ...")
        report = doctor.on_board(found, place.address(found), model=model)
    print(dumps(report.json()) if json else "\n".join(report.lines()))
    finish(report.exit_code)


@verb
def rollback(_: Context, board: str = "virtual") -> None:
    """Switch a board back to the previous release."""
    install(VENV, "boards")
    from ci.device import deploy, holding, place

    found = place.find(board)
    with holding.hold(found, "rollback", say=TELL) as held, holding.marked(held):
        deploy.rollback(found, place.address(found), TELL)


@verb
def board_free(_: Context, board: str = "virtual") -> None:
    """Clean up after a killed night or deploy: processes, lock, place, power, temporary files."""
    install(VENV, "boards")
    from ci.device import holding, place

    for line in holding.free(place.find(board)):
        TELL(line)


@verb
def board_health(
    _: Context,
    board: str = "virtual",
    bundle: str = "",
    renew: bool = False,
    out: str = OUT or "out",
    history: str = "",
) -> None:
    """Check a running board with a known-good bundle: files, answer, speed, memory and disk against earlier checks."""
    install(VENV, "boards")
    from ci.device import place
    from ci.nightly.health import main

    found, nightly = place.find(board), Path(out) / "nightly"
    work = nightly / found.name
    work.mkdir(parents=True, exist_ok=True)
    words = [str(found.yaml), history or str(nightly / "history"), str(work), str(work / "health.json")]
    with place.hold(found):
        succeed(main, [*words, *(["--renew"] if renew else []), *(["--bundle", bundle] if bundle else [])])


@verb
def board_soak(_: Context, board: str = "virtual", requests: int = 1000, out: str = OUT or "out") -> None:
    """Soak-test axrun serve of the deployed release with concurrent users: answers, errors, memory, latency."""
    install(VENV, "boards")
    from ci.device import evidence, place
    from ci.nightly.soak import main

    within("--requests", requests, 1, 1_000_000)
    found = place.find(board)
    deployed = evidence.place(Path(out), found.name)
    with place.hold(found):
        succeed(main, [str(found.yaml), str(deployed), str(Path(out) / f"soak-{found.name}.json"), str(requests)])


@verb
def board_status(_: Context, board: str = "virtual", json: bool = False) -> None:
    """Show whether a board answers, its versions and releases, who holds it, and the source of each setting."""
    import json as format_json

    install(VENV, "boards")
    from ci.device import board_status, place

    found = place.find(board)
    with _reached(found):
        seen = board_status.status(found, place.address(found))
    print(format_json.dumps(seen, indent=1) if json else "\n".join(board_status.lines(seen)), flush=True)
    finish(1 if seen["answers"] else 0)


@verb
def board_shell(_: Context, board: str = "virtual", command: str = "", even_if_held: bool = False) -> None:
    """Open a shell on a board, or run one command there."""
    install(VENV, "boards")
    from ci.device import board_shell, holding, place, reach

    found = place.find(board)
    with holding.alone(found, even_if_held, _warn):
        at = place.address(found)
        reach.require(found, at)
        _log_in(found, at)
        finish(board_shell.shell(found, at, command))


@verb
def board_ask(_: Context, prompt: str, board: str = "virtual", args: str = ARGS) -> None:
    """Run a prompt (- reads it from stdin) with the current release on a board and stream the answer."""
    install(VENV, "boards")
    from ci.device import place, reach, remote_axrun

    text = sys.stdin.read() if prompt == "-" else prompt
    found = place.find(board)
    with place.hold(found):
        at = place.address(found)
        reach.require(found, at)
        _log_in(found, at)
        finish(remote_axrun.ask(found, at, text, sys.stdout, sys.stderr, split(args)))


@verb
def board_serve(_: Context, board: str = "virtual", port: int = 0, args: str = ARGS) -> None:
    """Start the current release's server on a board, forwarded to a loopback port of this machine, until Ctrl-C."""
    install(VENV, "boards")
    from ci.device import place, reach, remote_axrun

    within("--port", port, 0, 65535)
    found = place.find(board)
    with place.hold(found), _ending():
        at = place.address(found)
        reach.require(found, at, TELL)
        _log_in(found, at)
        with remote_axrun.served(found, at, port, TELL, split(args)) as (url, far):
            TELL(f"{url}  (page at /, OpenAI's routes at /v1; Ctrl-C stops server and forward)")
            try:
                finish(far.wait())
            except KeyboardInterrupt:
                TELL("\nstopping the server on the board ...")
                far.close()
                TELL(f"{found.name}: axrun serve has stopped")


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _log_in(board: Board, at: Address) -> None:
    """Raises BadInput, with our message instead of ssh's, if the login fails."""
    from ci.device.connection import Connection

    with Connection(board, at):
        pass


@contextlib.contextmanager
def _reached(board: Board) -> Iterator[None]:
    """Reserves a farm's place, which cannot be reached otherwise; a desk board needs no reservation to look at it."""
    from ci.device import place

    if board.in_farm:
        with place.hold(board):
            yield
    else:
        yield


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP act like Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
