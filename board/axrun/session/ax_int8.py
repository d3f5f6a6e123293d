"""libax_engine with activations rounded to 8 bits where they meet s8 and s4 weights: faster, and less exact.

Each 128 activations share a scale. What that costs in quality `axrun eval --engine ax-int8` tells.
"""

from __future__ import annotations

import os

from axrun.errors import BadInput
from axrun.session import ax_engine
from axrun.session.ax_engine import AxSession, version

__all__ = ["open_session", "version"]


def open_session(path: str | os.PathLike[str], threads: int | None = None) -> AxSession:
    """Loads an axmodel of ours. Raises BadInput as ax does, and for an axmodel or an engine of another maker."""
    session = ax_engine.open_session(path, threads)
    if not session.flexible:
        raise BadInput(
            f"{os.fspath(path)} does not run on our own libax_engine, which engine ax-int8 is\nUse --engine ax."
        )
    session.round_activations(8)
    return session
