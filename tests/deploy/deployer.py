"""Deploys in a separate process, which a test can kill: `python deployer.py STATE HOST PORT USER ROOT PYTHON ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from axrun.errors import Failure
from ci.device.deploy import deploy
from ci.device.listing import Listing
from ci.device.place import Address, Board
from ci.device.wheelhouse import Package


def main(given: dict[str, str]) -> int:
    board = Board(
        "host",
        Path(given["yaml"]),
        Path(given["state"]),
        given["architecture"],
        given["python"],
        given["root"],
        "ort",
    )
    at = Address(given["host"], int(given["port"]), given["user"], Path(given["keyfile"]))
    site = Path(given["package"]) / "site"
    package = Package(site.parent, "", Listing.of(site))
    try:
        deploy(board, at, package, Path(given["bundle"]), "1+1=", keep=1, say=lambda line: print(line, flush=True))
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
