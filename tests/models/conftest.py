"""The scripts beside the shipped model are no package: their folder joins the import path, as when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models" / "tiny-qwen2"))
