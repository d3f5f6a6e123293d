"""Runs a command on the board and monitors it: python3 -I -S -c THIS COMMAND ... Prints one JSON object.

`code` (negative: a signal), `stdout`, the end of `stderr`, `cpu` seconds, the loaded `libraries` (path -> sha256),
the names of its environment `variables`, `peak` and `available` in bytes: its peak memory, and the least memory that
the board had left. Needs only Python 3.9.
"""

import contextlib
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile

POLL_SECONDS, SLOW_SECONDS = 0.05, 0.3  # before and after the engine is loaded
ENGINE = "libax_engine"
MOST_STDOUT, MOST_STDERR = 1 << 20, 4000
FLOODED = 125  # exit code if a command wrote too much
MOST_FILE = 64 << 20  # most bytes of output before the command is killed
KILLED = re.compile(r"out of memory|oom-kill|killed process", re.IGNORECASE)


def loaded(pid: int) -> set[str]:
    """Paths of the shared libraries mapped by a process: proc_pid_maps(5)."""
    fields = [line.split(None, 5) for line in text(f"/proc/{pid}/maps").splitlines()]
    return {line[5].strip() for line in fields if len(line) == 6 and ".so" in os.path.basename(line[5])}


def digest(path: str) -> str:
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                found.update(block)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return found.hexdigest()


def size(path: str, name: str) -> int:
    """The bytes of a line `name:   123 kB`; 0 if there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text(path), re.MULTILINE)
    return int(found.group(1)) << 10 if found else 0


def text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def kernel_says() -> str:
    """The last line about memory in the kernel log, if this user may read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next((line for line in reversed(done.stdout.splitlines()) if KILLED.search(line)), "")[:200]


def watch(command: list[str]) -> dict[str, object]:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        libraries: set[str] = set()
        flooded = False
        peak, available = 0, size("/proc/meminfo", "MemAvailable")
        while process.poll() is None:
            libraries |= loaded(process.pid)
            if any(os.fstat(file.fileno()).st_size > MOST_FILE for file in (stdout, stderr)):
                process.kill()
                stderr.write(b"\nerror: too much output\n")
                flooded = True
            peak = max(peak, size(f"/proc/{process.pid}/status", "VmHWM"))
            available = min(available, size("/proc/meminfo", "MemAvailable"))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SLOW_SECONDS if any(ENGINE in path for path in libraries) else POLL_SECONDS)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        stdout.seek(0)
        stderr.seek(max(stderr.seek(0, os.SEEK_END) - MOST_STDERR, 0))
        return {
            "code": FLOODED if flooded else process.returncode,
            "stdout": stdout.read(MOST_STDOUT).decode("utf-8", "replace"),
            "stderr": stderr.read().decode("utf-8", "replace"),
            "cpu": usage.ru_utime + usage.ru_stime,
            "libraries": {path: digest(path) for path in sorted(libraries)},
            "variables": sorted(os.environ),
            "peak": peak,
            "available": available,
            "kernel": kernel_says() if process.returncode in (-9, 137) else "",
        }


if __name__ == "__main__":
    print(json.dumps(watch(sys.argv[1:])))
