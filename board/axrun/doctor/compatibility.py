"""Tables of compatible versions, from the vendor's public files, headers and issue threads.

They list what is known to work and what is known to fail; anything else is reported as unknown.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Version = tuple[int, ...]


class Least(NamedTuple):
    """The minimum BSP version of a chip family, and the problem with older ones."""

    chip: str
    version: Version
    below: str


# Chip families by the name that a bundle is built for, and the names that /proc/ax_proc/chip_type gives their chips
# (AX650N_CHIP, AX650C_CHIP, AX630C_CHIP).
CHIPS = {"AX650": ("AX650", "AX8850"), "AX620E": ("AX630C", "AX620Q", "AX620E")}

# The families differ in the functions that libax_engine.so exports: only the AX620E's has AX_ENGINE_GetTotalOps, and
# both have AX_ENGINE_SetAffinity. AX650 SDK V1.45.0_P39, AX620E SDK V2.0.0_P7; pyaxengine tells chips apart by it.
BY_SYMBOLS = {(True, False): "AX650", (True, True): "AX620E"}

# https://github.com/AXERA-TECH/ax-llm/issues/4: a maintainer asks for V1.45.0_P38 where AX_ENGINE_CreateHandle fails
# for a language model's second layer or second run until the board is rebooted.
NEEDED = (Least("AX650", (1, 45, 0, 38), "AX_ENGINE_CreateHandle fails until the board is rebooted"),)

# pyaxengine's README: before these, AX_ENGINE_GetGroupIOInfo does not know bfloat16. axrun handles that.
SHOWS_BFLOAT16 = (Least("AX650", (2, 18), "shows bfloat16 as unknown"), Least("AX620E", (3, 12), "shows it as unknown"))

# BSP releases in public sources, and the engine versions seen with them (AX_ENGINE_GetVersion).
BSPS = {
    "AX650": ((1, 27), (1, 40), (1, 45), (2, 0), (2, 18), (3, 6), (3, 10)),
    "AX620E": ((1, 7), (2, 0), (3, 12)),
}
ENGINES = {"AX650": ((2, 10), (2, 12)), "AX620E": ((2, 6),)}

# Pulsar2 releases with public axmodels or documents. llm_build exists up to version 5, llm_build2 from 6 on.
PULSAR2 = (
    (1, 1),
    (1, 7),
    (1, 8),
    (1, 9),
    (3, 1),
    (3, 2),
    (3, 3),
    (4, 0),
    (4, 1),
    (5, 0),
    (5, 1),
    (5, 2),
    (6, 0),
    (7, 0),
)
LEAST_LLM_PULSAR2 = (3, 2)  # the first one with published results for language models


def number(text: str) -> Version:
    """The numbers of a version: `Ax_Version V1.45.0_P39` is (1, 45, 0, 39); the build date is ignored."""
    found = re.search(r"\d+(?:\.\d+)+(?:_P\d+)?", text)
    return tuple(int(part) for part in re.findall(r"\d{1,9}", found[0])) if found else ()


def family(chip_type: str) -> str:
    """The family of a chip; empty if unknown."""
    return next((family for family, names in CHIPS.items() if any(name in chip_type for name in names)), "")


def known(version: Version, table: tuple[Version, ...]) -> bool:
    """Whether a version is in the table."""
    return any(version[: len(entry)] == entry for entry in table)
