"""Downloads the locked wheels for the image with this machine's pip and its configuration.

The user's proxies, private indexes, certificates and wheel folders apply, but none of this reaches the image: there,
pip has no network and installs from a folder of files, with the locked hashes.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from packaging.markers import Marker

from axrun.errors import BadInput
from ci.container.base import architecture
from requirements.install import LOCKS, last_error, pip_command

SETS = ("build", "reference")  # requirement sets of the image, in the order of installation
PYTHON = "3.11"  # of base.SUITE
GLIBC = 36  # 2.36, of base.SUITE
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # fallback if the user's pip finds no torch
CONTINUED = re.compile(r"\\\n\s*")


def gather(folder: Path, venv: Path) -> None:
    """Downloads the missing wheels of `SETS` into `folder`. Raises BadInput."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        download(folder, venv, LOCKS / f"{name}.txt")
    try:
        download(folder, venv, LOCKS / "torch.txt")
    except BadInput:
        download(folder, venv, LOCKS / "torch.txt", f"--extra-index-url={TORCH_INDEX}")


def entries(lock: str) -> Iterator[str]:
    """The requirements of a lock file that apply to the image, one line each with hashes and without marker."""
    wanted = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.2",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": platform.machine(),
    }
    for line in CONTINUED.sub(" ", lock).splitlines():
        requirement, *hashes = line.split(" --hash=")
        if not hashes or line.lstrip().startswith("#"):
            continue
        pin, _, marker = requirement.partition(";")
        if not marker or Marker(marker.strip()).evaluate(wanted):
            yield " ".join([pin.strip(), *(f"--hash={digest.strip()}" for digest in hashes)])


def download(folder: Path, venv: Path, lock: Path, *more: str, only: Collection[str] = ()) -> None:
    """Downloads the image's wheels of a lock file, or only those of `only`, into `folder`. Raises BadInput."""
    platforms = [f"manylinux_2_{minor}_{platform.machine()}" for minor in range(GLIBC, 4, -1)]
    platforms += [f"manylinux{year}_{platform.machine()}" for year in ("2014", "2010", "1")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as flat:
        wanted = entries(lock.read_text("utf-8"))
        flat.writelines(f"{entry}\n" for entry in wanted if not only or entry.partition("==")[0] in only)
        flat.flush()
        command = pip_command(
            venv,
            *("download", "--require-hashes", "--no-deps", "--only-binary=:all:", f"--dest={folder}"),
            *(f"--python-version={PYTHON}", "--implementation=cp", *(f"--platform={tag}" for tag in platforms)),
            *("--requirement", flat.name, *more),
        )
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BadInput(
            f"cannot download the wheels of {lock.name} for {architecture()} Linux: {last_error(done.stderr)}\n"
            "Check the network, or put them into a folder and name it: WHEELS=folder."
        )


def main(argv: list[str]) -> None:
    gather(Path(argv[0]), Path(sys.prefix))


if __name__ == "__main__":
    main(sys.argv[1:])
