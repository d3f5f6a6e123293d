"""Registers qemu with binfmt_misc for arm64 programs: https://docs.kernel.org/admin-guide/binfmt-misc.html"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from axrun.errors import BadInput

MOUNTED = Path("/proc/sys/fs/binfmt_misc")
NAME = "qemu-aarch64"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# An ELF header of 64 bits, little endian, for machine 183 (EM_AARCH64); variable fields are masked.
MAGIC = bytes.fromhex("7f454c460201010000000000000000000200b700")
MASK = bytes.fromhex("ffffffffffffff00fffffffffffffffffeffffff")


def enable() -> None:
    """Does nothing if arm64 programs already run. Raises BadInput with the obstacle."""
    if platform.machine() == "aarch64" or _registered():
        return
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None:
        raise BadInput("arm64 programs need qemu here: apt-get install qemu-user-static")
    if os.geteuid() != 0:
        raise BadInput(
            "this kernel does not run arm64 programs yet, and only root can enable it: run this as root once"
        )
    if not (MOUNTED / "register").exists():
        mounted = subprocess.run(
            ["mount", "-t", "binfmt_misc", "binfmt_misc", str(MOUNTED)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            raise BadInput(f"this kernel has no binfmt_misc, which runs arm64 programs: {mounted.stderr.strip()}")
    # F: the kernel opens the emulator now, so that it also works inside other root file systems.
    magic, mask = ("".join(f"\\x{byte:02x}" for byte in header) for header in (MAGIC, MASK))
    try:
        (MOUNTED / "register").write_text(f":{NAME}:M::{magic}:{mask}:{emulator}:OCF")
    except FileExistsError:
        pass  # another process was quicker
    except OSError as error:
        raise BadInput(f"{MOUNTED}/register refuses {emulator}: {error.strerror}") from None
    if not _registered():
        raise BadInput(f"{MOUNTED} does not show an enabled emulator for arm64 after {emulator} was registered")


def _registered() -> bool:
    """Whether any entry runs arm64 programs inside other root file systems."""
    for entry in MOUNTED.glob("*"):
        if entry.name in ("register", "status"):
            continue
        text = entry.read_text("ascii", errors="replace")
        flags = re.search(r"^flags: (\w*)", text, re.M)
        if text.startswith("enabled") and f"magic {MAGIC.hex()}" in text and flags and "F" in flags[1]:
            return True
    return False
