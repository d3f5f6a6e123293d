"""The cache of llm_build's calibrations, ~/.cache/axc/calibrations (XDG_CACHE_HOME): repeated builds, and builds for
another chip or context length, reuse them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from axc import config, identity
from axc.calibration import text
from axc.calibration.file import checkpoint_digest
from axc.calibration.options import Options
from axc.checkpoints import Checkpoint
from axc.compile import weights


def place(options: Options) -> Path:
    """The path of the calibration with these options. Raises BadInput."""
    checkpoint = Checkpoint.open(options.input_path, options.lora)
    model = config.load(checkpoint, options.model_config, options.model_type)
    checkpoint = checkpoint.tied() if model.tie_word_embeddings else checkpoint
    key = {
        "checkpoint": checkpoint_digest(checkpoint, weights(model)),
        "text": [text.digest(options.calibration), options.tokens, options.window],
        "algorithm": options.decided(),
        "tools": tools(),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "axc" / "calibrations"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a container without a home: no cache
        cache = Path(tempfile.mkdtemp(prefix="axc-calibration-"))
    return cache / f"{name}.safetensors"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process writes `path`."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tools() -> dict[str, str]:
    """Names and versions of the tools that compute a calibration."""
    return {**identity.tools(), **{name: metadata.version(name) for name in ("torch", "transformers")}}
