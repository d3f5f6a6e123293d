"""The same tokens on every path through the KV cache, across every shape group and to the end of the context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axrun.errors import CheckFailed
from ci.nightly import metrics
from tests.hil.on_board import OnBoard

PATHS = Path(__file__).with_name("cache_paths.py")


def test_every_cache_path_matches_the_checkpoint(on_board: OnBoard, expect: Any) -> None:
    board = on_board.board
    threads = "1" if board.emulated else "0"
    said = on_board.python("the paths through the cache", PATHS.read_text("utf-8"), f"{on_board.release}/model",
                           board.engine, threads, runs=True)  # fmt: skip
    try:
        ways = json.loads(said)
    except ValueError:
        raise CheckFailed(f"the paths through the cache on {board.name} are {said[:80]!a}, expected figures") from None
    on_board.seen["cache"] = ways
    expect(metrics.cache(ways), on_board.maker)
