"""Memory that a bundle needs, and the memory that is free.

The vendor's axmodels are loaded into the contiguous memory of the NPU (CMM), ours into host memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.format.dtypes import DTYPES, FLOATS
from axrun.free_memory import MEMINFO, available
from axrun.model import POST_ROWS

CMM_INFO = Path("/proc/ax_proc/mem_cmm_info")  # Axera's driver: total size=...,remain=<kb>KB(<mb>MB + <kb>KB)

# Memory of the interpreter with numpy, tokenizers and an engine.
RUNTIME_BYTES = {"ax": 44 << 20, "ax-int8": 44 << 20, "ort": 80 << 20}
# Memory of onnxruntime relative to the size of the axmodel, by weight type: (after loading, additional while loading).
# It widens 8-bit and 16-bit floats and packs copies of matrices. Measured with onnxruntime 1.31 on Qwen2-0.5B.
ORT_COPIES = {"s8": (1.5, 3.0), "s4": (1.2, 3.0), "bf16": (2.1, 5.0), "fp16": (2.1, 5.0), "fp32": (1.4, 2.0)}
ORT_COPIES |= dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), (4.2, 10.0))
MAPPED = (1.0, 0.0)  # the other engines work on the mapped file

Allow = Callable[[str], bool]


@dataclass(frozen=True)
class Needs:
    """Memory needs in bytes, without the embedding table: it is mapped, and only one row per token is read."""

    weights: int
    kv_cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.buffers


@dataclass(frozen=True)
class Shortage:
    """`needs.total` bytes are needed and `left` bytes are free, of `what`: memory or CMM."""

    needs: Needs
    left: int
    what: str

    def text(self) -> str:
        """A one-line message with the numbers."""
        needs = self.needs
        parts = f"weights {needs.weights >> 20}, K/V {needs.kv_cache >> 20}, buffers {needs.buffers >> 20}"
        return f"the bundle needs {needs.total >> 20} MB of {self.what} ({parts}), {self.left >> 20} MB are free"


def refuse(shortage: str) -> bool:
    """Default policy: decline."""
    return False


def require(
    bundle: Bundle, engine: str, allow: Allow = refuse, cmm_info: Path = CMM_INFO, meminfo: Path = MEMINFO
) -> None:
    """Raises BadInput if a bundle needs more memory than is free, unless `allow(message)` returns True.

    Does nothing if the free memory is unknown, e.g. on a system without /proc.
    """
    found = shortage(bundle, engine, cmm_info, meminfo)
    if found is not None and not allow(found.text()):
        raise BadInput(
            f"{found.text()}\nStop other programs or build with a smaller --kv_cache_len; --force tries anyway."
        )


def shortage(
    bundle: Bundle,
    engine: str,
    cmm_info: Path = CMM_INFO,
    meminfo: Path = MEMINFO,
    slots: int = 1,
    held: int = 0,
    kv_limit: int | None = None,
) -> Shortage | None:
    """The shortage of memory for the bundle; None if it fits or the free memory is unknown.

    `slots`: number of K/V caches. `held`: bytes of the free memory that must stay free. `kv_limit`: see `needs`.
    """
    needed = needs(bundle, engine, slots, kv_limit)
    cmm = cmm_left(cmm_info) if bundle.maker == "pulsar2" else None
    left, what = (available(meminfo), "memory") if cmm is None else (cmm, "CMM")
    if left is not None and what == "memory":
        left = max(left - held, 0)
    return Shortage(needed, left, what) if left is not None and left < needed.total else None


def runtime_bytes(engine: str) -> int:
    """Bytes of memory that the process takes, whatever it has loaded."""
    return RUNTIME_BYTES.get(engine, RUNTIME_BYTES["ort"])


def pools(bundle: Bundle, engine: str) -> bool:
    """Whether the K/V caches of a bundle share a pool, which may be smaller than all of them."""
    return engine != "ort" and bundle.maker != "pulsar2"


def mapped(bundle: Bundle, engine: str) -> int:
    """Bytes of a loaded bundle's axmodels that the system counts as free memory, since it could read them again."""
    if not pools(bundle, engine):
        return 0
    return sum(path.stat().st_size for path in (*map(bundle.layer_path, range(bundle.layers)), bundle.post_path))


def needs(bundle: Bundle, engine: str, slots: int = 1, kv_limit: int | None = None) -> Needs:
    """The peak memory of the bundle, which may occur while its largest axmodel is loaded.

    `kv_limit`: bytes of all K/V caches, with an engine whose caches share a pool.
    """
    weights = loading = 0.0
    for path in (*map(bundle.layer_path, range(bundle.layers)), bundle.post_path):
        flag = "post_weight_type" if path == bundle.post_path else "weight_type"
        kept, more = ORT_COPIES.get(bundle.flag(flag), MAPPED) if engine == "ort" else MAPPED
        size = path.stat().st_size
        weights, loading = weights + kept * size, max(loading, more * size)
    width = DTYPES[FLOATS[bundle.hidden_state_type]].bits // 8
    tokens, history = (max(getattr(group, name) for group in bundle.groups) for name in ("tokens", "history"))
    mask = tokens * (tokens + history)
    values = 2 * tokens * (bundle.hidden_size + bundle.kv_size) + mask + (POST_ROWS + 1) * bundle.hidden_size
    logits = 4 * (POST_ROWS + 1) * bundle.vocab_size
    kv_cache = 2 * slots * bundle.layers * history * bundle.kv_size * width
    if kv_limit is not None and pools(bundle, engine):
        kv_cache = min(kv_cache, kv_limit)
    return Needs(
        weights=int(weights + loading),
        kv_cache=kv_cache,
        buffers=values * width + logits + runtime_bytes(engine),
    )


def remaining(cmm_info: Path = CMM_INFO, meminfo: Path = MEMINFO) -> str:
    """Free memory as the vendor's runner prints it: `remain_cmm(2048 MB)` or `remain_mem(...)`; empty if unknown."""
    cmm, memory = cmm_left(cmm_info), available(meminfo)
    if cmm is not None:
        return f"remain_cmm({cmm >> 20} MB)"
    return "" if memory is None else f"remain_mem({memory >> 20} MB)"


def cmm_left(cmm_info: Path = CMM_INFO) -> int | None:
    """Free bytes of contiguous memory (CMM); None without the NPU driver."""
    found = re.search(r"total size.*?remain=(\d+)KB\(", _text(cmm_info))
    return int(found[1]) << 10 if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
