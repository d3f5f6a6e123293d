"""Preflight: checks gates, history and power before a night begins. Raises BadInput (exit code 2).

A night is judged by the gates of its board and model. The first UNJUDGED nights of a maker have none: they are recorded
but not judged. After that, preflight refuses to run until gates are recorded.
"""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from axrun.errors import BadInput
from axrun.format.bundle import read_manifest
from ci.device import commands, place, power, settings
from ci.device.place import Board
from ci.nightly import gate, history, instructions, metrics, quarantine, variant
from ci.nightly.gate import Gate
from ci.nightly.history import History
from ci.nightly.quarantine import Quarantine

UNJUDGED = 5  # nights of a maker that may run without gates


@dataclass(frozen=True)
class Plan:
    """Gates and quarantine of a night. `unjudged`: why it is not judged, empty if it is. `notes`: for the report."""

    maker: str
    gates: Mapping[str, Gate]
    unjudged: str
    notes: tuple[str, ...]
    quarantine: Quarantine = quarantine.NONE


def check(
    board: Board,
    model: str,
    bundle: Path | None,
    folder: Path,
    before: History,
    gates: Path = gate.GATES,
    quarantined: Path = quarantine.FILE,
) -> Plan:
    """Raises BadInput with the first obstacle to a night.

    `bundle` is one that was built elsewhere, `folder` the history folder, `before` the nights in it.
    """
    maker = "cpu" if bundle is None else str(read_manifest(bundle)["maker"])
    place.require_power(board)
    history.require_writable(folder, board.name, model)
    found = gate.load(board.name, model, maker, gates)
    _require_measurable(gate.place(board.name, model, gates), board, maker, found)
    unjudged = "" if found else _unjudged(board, model, maker, before, gates)
    models = sorted(path.stem for path in (place.ROOT / "models").glob("*.toml"))
    boards = sorted({board.name, *(path.stem for path in place.BOARDS.glob("*.yaml"))})
    kept = quarantine.load(board.name, model, models, boards, quarantined, gates)
    notes = [
        *power.unable(board),
        *_removed_gates(found, maker, before),
        *_skipped_gates(found),
        *_wide_gates(found),
        *kept.notes(),
    ]
    held = {name: entry for name, entry in found.items() if not instructions.not_applicable(name)}
    return Plan(maker, held, unjudged, tuple(notes), kept)


def require_set_up(board: Board) -> None:
    """Raises BadInput for a farm without a coordinator, and for a board whose address is still a placeholder."""
    if board.in_farm:
        if not os.environ.get("LG_COORDINATOR"):
            raise BadInput("the board is in a farm: set its coordinator, LG_COORDINATOR=host:20408")
        return
    at = place.address(board)
    if "address" not in board.given and board.yaml.parent == place.BOARDS and not board.emulated:
        try:
            socket.getaddrinfo(at.host, at.port)
        except OSError:
            raise BadInput(
                f"{board.name} is not set up on this machine: {at.host!a}, the placeholder in {board.yaml}, does not "
                f"resolve\nSet its address in {settings.file(board.yaml.stem)}: docs/boards.md"
            ) from None


def _require_measurable(file: Path, board: Board, maker: str, gates: Mapping[str, Gate]) -> None:
    for name in gates:
        counted = board.emulated and name.startswith(metrics.COUNTED)
        if name not in metrics.MEASURED and not counted:
            raise BadInput(
                f"{file}: no night measures {maker}.{name}; a night measures {', '.join(metrics.MEASURED)}\n"
                "Correct the name, or remove the gate."
            )


def _unjudged(board: Board, model: str, maker: str, before: History, gates: Path) -> str:
    """Why a night without gates may run unjudged. Raises BadInput if it may not."""
    file = gate.place(board.name, model, gates)
    if meant := _near(file, gates):
        raise BadInput(f"there is no {file}, but {meant}: is its name misspelled?")
    judged = [night for night in before.nights if night.maker == maker and night.gates]
    if judged:
        raise BadInput(
            f"the gates for {maker} bundles of {model} on {board.name} disappeared: {len(judged[-1].gates)} judged the "
            f"night of {judged[-1].started[:10]}\nRestore them in {file}."
        )
    held = history.measured(before.nights, maker)
    if len(held) >= UNJUDGED:
        raise BadInput(
            f"{len(held)} nights of {maker} bundles of {model} on {board.name} are recorded, but there are no gates\n"
            "If their figures are right, record gates from them: "
            + commands.invoke("gate.record", "--board", board.argument, "--model", model, "--maker", maker)
        )
    return f"recorded, not judged: no gates for {maker} bundles yet, night {len(held) + 1} of {UNJUDGED}"


def _near(file: Path, gates: Path) -> Path | None:
    """A gate file with a similar name that belongs to no known board and model."""
    models = {path.stem for path in (place.ROOT / "models").glob("*.toml")}
    boards = {path.stem for path in place.BOARDS.glob("*.yaml")}
    there = [path for path in gates.glob("*/*") if path.name != file.name or path.parent != file.parent]
    strays = {
        f"{path.parent.name}/{path.name}": path
        for path in there
        if path.suffix != ".toml" or variant.model_of(path.stem) not in models or path.parent.name not in boards
    }
    near = difflib.get_close_matches(f"{file.parent.name}/{file.name}", strays, 1, 0.85)
    return strays[near[0]] if near else None


def _skipped_gates(gates: Mapping[str, Gate]) -> Iterator[str]:
    """Notes on gates that do not apply on this machine."""
    for name in gates:
        if why := instructions.not_applicable(name):
            yield f"not judged: {metrics.find(name).label}: {why}"


def _wide_gates(gates: Mapping[str, Gate]) -> Iterator[str]:
    """Notes on gates that pass almost any value."""
    for name, entry in gates.items():
        if entry.wide:
            yield f"the gate of {metrics.find(name).label} passes almost any value: {entry.text()}"


def _removed_gates(gates: Mapping[str, Gate], maker: str, before: History) -> Iterator[str]:
    """Notes on gates that judged the last night and no longer exist."""
    judged = [night for night in before.nights if night.maker == maker and night.gates]
    if not judged or not gates:
        return
    for name, text in judged[-1].gates.items():
        if name not in gates:
            yield (
                f"a gate disappeared since the night of {judged[-1].started[:10]}: {metrics.find(name).label} had to "
                f"be {text}, and is no longer judged"
            )
