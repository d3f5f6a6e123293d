"""Reads the state of a board: status, versions, memory, disk, temperatures, clocks, the kernel log. Read-only."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ci.device.on_board import proc, tree
from ci.device.on_board.process import SHOWN
from ci.device.on_board.releases import Releases
from ci.device.on_board.requests import Refused, answer

SYS = Path("/sys")
MOST_SENSORS, MOST_TEXT = 64, 200
MOST_LOG, LOG_SECONDS = 256 << 10, 20
# name of a version -> file under /proc; the first three are the vendor's
NAMED = {"bsp": "ax_proc/version", "id": "ax_proc/board_id", "chip": "ax_proc/chip_type", "model": "device-tree/model"}


class State:
    """The requests; each reads fresh values."""

    def __init__(self, root: str) -> None:
        self.releases = Releases(root)

    def facts(self) -> dict[str, Any]:
        """The same facts as for a deploy."""
        return self.releases.facts()

    def status(self) -> dict[str, Any]:
        """The status of the board and its current release; None for unknown values. Sizes in bytes."""
        releases = self.releases
        disk = os.statvfs(releases.above())
        current = releases.linked()
        try:
            release = releases.release(current) if current else {}
        except Refused:
            release = {}
        uptime = re.match(r"\d+", proc.read(proc.PROC / "uptime"))
        return {
            "user": getpass.getuser(),
            "host": platform.node(),
            "system": proc.system() or platform.system(),
            "kernel": platform.release(),
            "board": _word(proc.PROC / "device-tree/model"),
            "bsp": _word(proc.PROC / "ax_proc/version"),
            "board_id": _word(proc.PROC / "ax_proc/board_id"),
            "chip": _word(proc.PROC / "ax_proc/chip_type"),
            "uptime": int(uptime.group()) if uptime else None,
            "memory_total": proc.memory("MemTotal"),
            "cmm_total": proc.cmm("total"),
            "disk_total": disk.f_blocks * disk.f_frsize,
            "temperatures": [[name, f"{degrees:.1f}"] for name, degrees in self.readings()["degrees"].items()],
            "devices": [[path, "yes" if os.access(path, os.R_OK | os.W_OK) else "no"] for path in _devices()],
            "engines": [[path, _engine_version(path)] for path in self._engines()],
            "releases": sorted(folder.name for folder in releases.folders("releases")),
            "package": str(release["package"]) if "package" in release else None,
            "model": str(release["name"]) if "name" in release else None,
            "prompt": str(release["prompt"])[:SHOWN] if "prompt" in release else None,
            "locked": self._held(),
        }

    def state(self) -> dict[str, Any]:
        """Versions by name, and sizes in bytes; None for unknown values."""
        disk = os.statvfs(self.releases.above())
        return {
            "versions": self._versions(),
            "memory_total": proc.memory("MemTotal"),
            "memory": proc.memory("MemAvailable"),
            "cmm": proc.cmm("remain"),
            "disk_total": disk.f_blocks * disk.f_frsize,
            "disk": disk.f_bavail * disk.f_frsize,
        }

    def limits(self) -> dict[str, Any]:
        """The lowest trip point of each temperature in degrees, and the maximum of each clock in MHz."""
        hot = {}
        for name, zone in _zones():
            points = []
            for kind in sorted(zone.glob("trip_point_*_type")):
                if proc.read(kind).strip() in ("passive", "hot", "critical"):
                    value = _number(kind.with_name(kind.name.replace("_type", "_temp")))
                    points += [value / 1000] if value is not None and value > 0 else []
            if points:
                hot[name] = min(points)
        most, governors = {}, set()
        for name, clock in _clocks():
            value = _number(clock / "cpuinfo_max_freq")
            if value:
                most[name] = value / 1000
            governors.add(proc.read(clock / "scaling_governor").strip()[:40])
        return {"hot": hot, "most": most, "governor": ", ".join(sorted(governors - {""}))}

    def readings(self) -> dict[str, Any]:
        """Temperatures in degrees Celsius, clocks in MHz, and active cooling devices, by name."""
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
        """The end of the kernel log; `why` has the error if it cannot be read."""
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
        found = {name: proc.read(proc.PROC / path).replace("Ax_Version", "") for name, path in NAMED.items()}
        found["system"] = proc.system()
        python = tree.interpreter()
        found["kernel"] = platform.release()
        found["python"] = f"{python['version']}, {python['program']}, sha256 {python['program_sha256'][:12]}"
        found["driver"] = _driver()
        engine = proc.vendors_engine()
        found["vendor's engine"] = f"sha256 {_digest(Path(engine))[:12]}" if engine else ""
        cleaned = {name: value.replace("\0", "").strip()[:MOST_TEXT] for name, value in found.items()}
        return {name: value for name, value in cleaned.items() if value}

    def _held(self) -> str | None:
        """Who is deploying right now, if anybody."""
        try:
            with (self.releases.root / "lock").open("r") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return lock.read(200).strip() or "somebody"
        except OSError:
            pass
        return None

    def _engines(self) -> list[str]:
        """The engine libraries: the package's for this architecture, and the vendor's."""
        ours = sorted(str(path) for path in (self.releases.current / "package").glob("*/engine/lib/libax_engine.so"))
        return [*ours, *(path for path in proc.ENGINE_LIBRARIES if os.path.exists(path))]


def _driver() -> str:
    """The number of the vendor's kernel modules and a digest of their versions; empty if there are none."""
    loaded = sorted(
        line.split(" ")[0] for line in proc.read(proc.PROC / "modules").splitlines() if line.startswith("ax_")
    )
    told = [f"{name} {proc.read(SYS / 'module' / name / 'srcversion').strip()}" for name in loaded]
    digest = hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
    return f"{len(loaded)} modules of ax_*, sha256 {digest}" if loaded else ""


def _zones() -> list[tuple[str, Path]]:
    zones = sorted(SYS.glob("class/thermal/thermal_zone*"))[:MOST_SENSORS]
    return [(_name(zone), zone) for zone in zones]


def _clocks() -> list[tuple[str, Path]]:
    clocks = sorted(SYS.glob("devices/system/cpu/cpu[0-9]*/cpufreq"))[:MOST_SENSORS]
    return [(clock.parent.name, clock) for clock in clocks]


def _name(device: Path) -> str:
    """The type of a thermal device, and its number."""
    number = re.sub(r"\D", "", device.name)
    return f"{proc.read(device / 'type').strip()[:40] or 'unnamed'} {number}"


def _number(file: Path) -> int | None:
    found = re.fullmatch(r"-?\d{1,12}", proc.read(file).strip())
    return int(found.group()) if found else None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def _word(path: str | Path) -> str | None:
    """The first line of a file; None if there is none."""
    lines = proc.read(path).replace("\0", "").strip().splitlines()
    return lines[0][:SHOWN] if lines else None


def _devices() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("ax_*"))[:32]


def _engine_version(path: str) -> str:
    """The version reported by a libax_engine, loaded in a separate process; empty if it fails."""
    code = (
        "import ctypes, sys; get = ctypes.CDLL(sys.argv[1]).AX_ENGINE_GetVersion; get.restype = ctypes.c_char_p; "
        "print((get() or b'').decode('utf-8', 'replace'))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()[:200]


def main(root: str) -> None:
    answer(State(root))
