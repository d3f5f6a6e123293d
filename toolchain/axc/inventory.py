"""Summarises the content of a bundle in a few lines."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path


def inventory(bundle: Path) -> str:
    """One line per kind of file in a bundle (count, size, purpose), and the total."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        path = file.relative_to(bundle)
        kind = f"{path.parts[0]}/" if len(path.parts) > 1 else re.sub(r"_l\d+", "_l*", path.name)
        counts[kind] += 1
        sizes[kind] += file.stat().st_size
    rows = [(counts[kind], sizes[kind], kind) for kind in counts] + [(counts.total(), sizes.total(), "in all")]
    return "\n".join(f"{count:5} x {decimal(size):>9}  {kind}" for count, size, kind in rows)


def decimal(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
