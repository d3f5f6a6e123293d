"""The peer to compare with in benchmarks, if available."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def llama() -> str | None:
    """A Python that has llama-cpp-python and gguf, the one that LLAMA_PYTHON names; says how to get one if none is."""
    python = os.environ.get("LLAMA_PYTHON")
    if python is None:
        print("\nwithout llama.cpp, which `make bench PEER=llama.cpp` builds and measures beside us")
    return python
