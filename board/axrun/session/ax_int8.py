"""libax_engine with 8-bit activations in products with s8 and s4 weights: faster, less exact.

Each block of 128 activations has one scale. `axrun eval --engine ax-int8` measures the loss of quality.
"""

from __future__ import annotations

import os

from axrun.errors import BadInput
from axrun.session import ax_engine
from axrun.session.ax_engine import AxSession, version

__all__ = ["open_session", "version"]


def open_session(path: str | os.PathLike[str], threads: int | None = None) -> AxSession:
    """Loads one of our axmodels. Raises BadInput like engine ax, and for an axmodel or library that is not ours."""
    session = ax_engine.open_session(path, threads)
    if not session.flexible:
        raise BadInput(
            f"{os.fspath(path)} does not run on our own libax_engine, which engine ax-int8 needs\nUse --engine ax."
        )
    session.round_activations(8)
    return session
