"""What a night wants to know of a board itself: versions, memory, disk, temperatures, clocks, the kernel's log.

Sent over SSH like ci/device/on_board.py; it reads one JSON object a line and answers each with one. It changes nothing,
and needs Python 3.9 and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

IDLE_SECONDS = 3600  # without a request, the other side is gone, whatever the network says
PROC, SYS, ETC = Path("/proc"), Path("/sys"), Path("/etc")
ENGINES = ("/soc/lib/libax_engine.so", "/usr/lib/libax_engine.so", "/opt/lib/libax_engine.so")
MOST_SENSORS, MOST_TEXT = 64, 200
MOST_LOG, LOG_SECONDS = 256 << 10, 20
# file below /proc, and what a version is called; the first three are the vendor's
NAMED = {"bsp": "ax_proc/version", "id": "ax_proc/board_id", "chip": "ax_proc/chip_type", "model": "device-tree/model"}


class State:
    """Everything is read anew at each request."""

    def __init__(self, root: str) -> None:
        self.root = Path.home() / root

    def state(self) -> dict[str, Any]:
        """Versions by name, and sizes in bytes; None where the board does not tell."""
        above = next(path for path in (self.root, *self.root.parents) if path.is_dir())
        disk = os.statvfs(above)
        meminfo, cmm = _read(PROC / "meminfo"), _read(PROC / "ax_proc" / "mem_cmm_info")
        remain = re.search(r"total size.*?remain=(\d+)KB\(", cmm)
        return {
            "versions": self._versions(),
            "memory_total": _kilobytes(meminfo, "MemTotal"),
            "memory": _kilobytes(meminfo, "MemAvailable"),
            "cmm": int(remain.group(1)) << 10 if remain else None,
            "disk_total": disk.f_blocks * disk.f_frsize,
            "disk": disk.f_bavail * disk.f_frsize,
        }

    def limits(self) -> dict[str, Any]:
        """For each temperature, the degrees from which the kernel slows down or cuts; for each clock, its most MHz."""
        hot = {}
        for name, zone in _zones():
            points = []
            for kind in sorted(zone.glob("trip_point_*_type")):
                if _read(kind).strip() in ("passive", "hot", "critical"):
                    value = _number(kind.with_name(kind.name.replace("_type", "_temp")))
                    points += [value / 1000] if value is not None and value > 0 else []
            if points:
                hot[name] = min(points)
        most, governors = {}, set()
        for name, clock in _clocks():
            value = _number(clock / "cpuinfo_max_freq")
            if value:
                most[name] = value / 1000
            governors.add(_read(clock / "scaling_governor").strip()[:40])
        return {"hot": hot, "most": most, "governor": ", ".join(sorted(governors - {""}))}

    def readings(self) -> dict[str, Any]:
        """Degrees Celsius, MHz, and which cooling devices act, by name."""
        degrees = {name: _number(zone / "temp") for name, zone in _zones()}
        clocks = {name: _number(clock / "scaling_cur_freq") for name, clock in _clocks()}
        cooling = {}
        for device in sorted(SYS.glob("class/thermal/cooling_device*"))[:MOST_SENSORS]:
            value = _number(device / "cur_state")
            if value is not None and value > 0:
                cooling[_name(device)] = value
        return {
            "degrees": {name: value / 1000 for name, value in degrees.items() if value is not None},
            "clocks": {name: value / 1000 for name, value in clocks.items() if value is not None},
            "cooling": cooling,
        }

    def log(self) -> dict[str, Any]:
        """The end of the kernel's log; `why` it cannot be read, empty where it can."""
        try:
            done = subprocess.run(["dmesg"], stdin=subprocess.DEVNULL, capture_output=True, timeout=LOG_SECONDS)
        except FileNotFoundError:
            return {"text": "", "why": "there is no dmesg"}
        except (OSError, subprocess.SubprocessError) as error:
            return {"text": "", "why": str(error)[:MOST_TEXT]}
        said = (done.stderr.decode("utf-8", "replace").strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {
            "text": done.stdout[-MOST_LOG:].decode("utf-8", "replace"),
            "why": said[:MOST_TEXT] if done.returncode else "",
        }

    def _versions(self) -> dict[str, str]:
        found = {name: _read(PROC / path).replace("Ax_Version", "") for name, path in NAMED.items()}
        pretty = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read(ETC / "os-release"), re.MULTILINE)
        found["system"] = pretty.group(1) if pretty else ""
        found["kernel"], found["python"] = platform.release(), platform.python_version()
        found["driver"] = _driver()
        engine = next((path for path in ENGINES if os.path.exists(path)), None)
        found["vendor's engine"] = f"sha256 {_digest(Path(engine))[:12]}" if engine else ""
        cleaned = {name: value.replace("\0", "").strip()[:MOST_TEXT] for name, value in found.items()}
        return {name: value for name, value in cleaned.items() if value}


def _driver() -> str:
    """The vendor's kernel modules: how many, and a digest of their versions; empty where there are none."""
    loaded = sorted(line.split(" ")[0] for line in _read(PROC / "modules").splitlines() if line.startswith("ax_"))
    told = [f"{name} {_read(SYS / 'module' / name / 'srcversion').strip()}" for name in loaded]
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
    return f"{len(loaded)} modules of ax_*, sha256 {digest}" if loaded else ""


def _zones() -> list[tuple[str, Path]]:
    zones = sorted(SYS.glob("class/thermal/thermal_zone*"))[:MOST_SENSORS]
    return [(_name(zone), zone) for zone in zones]


def _clocks() -> list[tuple[str, Path]]:
    clocks = sorted(SYS.glob("devices/system/cpu/cpu[0-9]*/cpufreq"))[:MOST_SENSORS]
    return [(clock.parent.name, clock) for clock in clocks]


def _name(device: Path) -> str:
    """Its type, and the number that tells two of a type apart."""
    number = re.sub(r"\D", "", device.name)
    return f"{_read(device / 'type').strip()[:40] or 'unnamed'} {number}"


def _number(file: Path) -> int | None:
    found = re.fullmatch(r"-?\d{1,12}", _read(file).strip())
    return int(found.group()) if found else None


def _kilobytes(text: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) << 10 if found else None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""


def main(root: str) -> None:
    state = State(root)
    _answer({"ok": "ready"})
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            break
        verb = json.loads(line)["do"]
        try:
            answer = {"ok": getattr(state, verb)()}
        except OSError as error:
            answer = {"error": "system", "text": f"{error.strerror}: {error.filename}"}
        _answer(answer)


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
