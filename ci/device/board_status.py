"""The status of a board: whether it answers, its versions and release, its holder, the source of each setting."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from axrun.errors import Failure
from ci.device import commands, holding, reach, settings
from ci.device.connection import Connection
from ci.device.place import Address, Board
from ci.device.programs import STATE

SWITCHED = {"port": "its power port", "manual": "its user", "none": "nothing"}
SETTINGS = ("address", "user", "port", "keyfile", "power", "root", "python", "engine")


def status(board: Board, at: Address) -> dict[str, Any]:
    """The content of --json; `answers` says why the board does not answer, empty if it does."""
    known: dict[str, Any] = {
        "board": board.name,
        "argument": board.argument,
        "emulated": board.emulated,
        "settings": _settings(board, at),
        "switch": board.switch,
        "holder": holder(board),
        "left": [note.title for note in holding.read(board) if not holding.alive(board, note)],
        "answers": reach.silence(at),
    }
    if known["answers"]:
        return {**known, "advice": reach.advice(board, known["answers"])}
    try:
        with Connection(board, at, STATE) as link:
            return {**known, "facts": link.call("facts"), "status": link.call("status")}
    except Failure as failure:
        why, _, advice = str(failure).partition("\n")
        return {**known, "answers": why, "advice": advice}


def holder(board: Board) -> str:
    """Who holds the board on this machine; empty if nobody does. Reads /proc/locks instead of taking the lock."""
    file = board.state / "lock"
    try:
        number = file.stat().st_ino
        held = re.findall(rf"FLOCK\s+\S+\s+WRITE\s+(\d+)\s+[0-9a-f]+:[0-9a-f]+:{number}\s", _text("/proc/locks"))
        return (file.read_text("utf-8", "replace").strip()[:200] or f"process {held[0]}") if held else ""
    except OSError:
        return ""


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The status as lines for a console."""
    title = f"{found['board']} (emulated)" if found["emulated"] else found["board"]
    if found["answers"]:
        yield f"{title}: no answer: {found['answers']}"
        if found["advice"]:
            yield found["advice"]
    else:
        yield f"{title}: answers"
        yield from (f"  {name:<12}{text}" for name, text in _rows(found["facts"], found["status"]) if text)
    yield f"  {'held by':<12}{found['holder'] or 'nobody'}"
    for title in found["left"]:
        free = commands.invoke("board.free", "--board", found["argument"])
        yield f"  {'left by':<12}{title}, which was killed: {free}"
    yield f"  {'switched by':<12}{SWITCHED[found['switch']]}"
    yield "settings"
    for name, (value, source) in found["settings"].items():
        yield f"  {name:<12}{value}  ({source})"


def _rows(facts: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    show = {key: _shown(value) for key, value in {**facts, **told}.items() if isinstance(value, str)}
    yield "user", f"{show['user']}@{show['host']}, up {_duration(told['uptime'])}"
    yield "machine", ", ".join(show[key] for key in ("board", "board_id", "chip", "architecture") if show.get(key))
    yield "system", f"{show['system']}, kernel {show['kernel']}, glibc {show['glibc']}, Python {show['python']}"
    yield "BSP", show.get("bsp", "")
    yield "memory", _left(facts["memory"], told["memory_total"])
    yield "CMM", _left(facts["cmm"], told["cmm_total"]) if facts["cmm"] is not None else "no NPU driver"
    yield "disk", f"{_left(facts['free'], told['disk_total'])} in {show['root']}" + _access(facts)
    yield "temperature", ", ".join(f"{_shown(name)} {_shown(value)} °C" for name, value in told["temperatures"])
    yield "devices", _devices(told["devices"])
    for path, version in told["engines"]:
        yield "engine", f"{_shown(path)}: {_shown(version) or 'does not load'}"
    current = show.get("current")
    yield "release", f"{current}, one of {len(told['releases'])}" if current else "none yet"
    if current:
        yield "package", show.get("package", "")
        yield "model", f"{show.get('model', '')}, asked {show.get('prompt', '')!r} when deployed"
    yield "deploying", show.get("locked", "")


def _settings(board: Board, at: Address) -> dict[str, tuple[str, str]]:
    """Value and source of each setting."""
    said = {
        "address": at.host,
        "user": at.user,
        "port": str(at.port),
        "keyfile": str(at.keyfile),
        "power": settings.hidden(board.power),
        "root": board.root,
        "python": board.python,
        "engine": board.engine,
    }
    yaml, state = str(board.yaml), board.given.get("state")
    found = {
        name: (said[name], board.given[name].source if name in board.given else yaml)
        for name in SETTINGS
        if said[name] or name in board.given
    }
    home = "XDG_STATE_HOME" if os.environ.get("XDG_STATE_HOME") else "default"
    return {**found, "state": (str(board.state), state.source if state else home)}


def _left(left: int | None, total: int | None) -> str:
    if left is None:
        return ""
    return f"{left >> 20} MB left" + (f" of {total >> 20} MB" if total is not None else "")


def _access(facts: Mapping[str, Any]) -> str:
    if facts["read_only"]:
        return ", mounted read-only"
    return "" if facts["writable"] else ", which cannot be written"


def _devices(devices: list[list[str]]) -> str:
    if not devices:
        return ""
    shut = [_shown(path) for path, open_ in devices if open_ != "yes"]
    return f"{len(devices)} /dev/ax_*, " + (f"not for this user: {', '.join(shut)}" if shut else "all for this user")


def _duration(seconds: int | None) -> str:
    if seconds is None:
        return "unknown time"
    days, rest = divmod(seconds, 86400)
    return f"{days} d " * bool(days) + f"{rest // 3600} h {rest % 3600 // 60} min"


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""
