"""How much memory is left, as the board's driver and the kernel say it."""

from __future__ import annotations

import re
from pathlib import Path

from board.memory import MEMINFO, remaining

CMM = """--------------------SDK VERSION-------------------
[Axera version]: ax_cmm V2.0.0
+---PARTITION: Phys(0x80000000, 0xFFFFFFFF), Size=2097152KB(2048MB),    NAME="anonymous"
---CMM_USE_INFO:
 total size=2097152KB(2048MB),used=100352KB(98MB + 0KB),remain=1996800KB(1950MB + 0KB),partition_number=1
"""


def test_a_boards_cmm_comes_first(tmp_path: Path) -> None:
    info = tmp_path / "mem_cmm_info"
    info.write_text(CMM)
    assert remaining(cmm_info=info) == "remain_cmm(1950 MB)"


def test_elsewhere_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    seen = re.fullmatch(r"remain_mem\((\d+) MB\)", remaining(cmm_info=tmp_path / "none"))
    assert seen
    total = re.search(r"MemTotal:\s+(\d+) kB", MEMINFO.read_text())
    assert total
    assert 0 < int(seen[1]) <= int(total[1]) // 1024


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "odd").write_text("total size=?")
    assert remaining(tmp_path / "odd", tmp_path / "none") == ""
