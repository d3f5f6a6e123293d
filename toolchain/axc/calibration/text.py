"""The text that a model is calibrated on, as windows of token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput

# this project's documents and code as they once were, and prose and dialogue in several languages written for it
DEFAULT = Path(__file__).with_name("text.txt")
MOST = 64 << 20  # bytes of a text


@dataclass(frozen=True)
class Text:
    """`windows` [count, n] of token ids; `sha256` of the files, one after the other."""

    windows: NDArray[np.int64]
    sha256: str
    names: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return int(self.windows.size)


def digest(paths: tuple[Path, ...]) -> str:
    """Of the files, or of the text that comes with axc. Raises BadInput."""
    return hashlib.sha256("\0".join(read(path) for path in paths or (DEFAULT,)).encode()).hexdigest()


def read(path: Path) -> str:
    """Raises BadInput."""
    try:
        if path.stat().st_size > MOST:
            raise BadInput(f"{path} is larger than {MOST >> 20} MiB\nA few hundred kilobytes of text suffice.")
        return path.read_text("utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no UTF-8 text: byte {error.start}") from None


def windows(paths: tuple[Path, ...], tokenizer: Any, tokens: int, window: int, vocabulary: int) -> Text:
    """Of at most `tokens` tokens in all, an equal share from each file. Raises BadInput for too little text."""
    paths = paths or (DEFAULT,)
    found: list[NDArray[np.int64]] = []
    for path in paths:
        ids = np.array(tokenizer.encode(read(path), add_special_tokens=False), np.int64)
        ids = ids[ids < vocabulary]
        count = min(len(ids), tokens // len(paths)) // window
        found.append(ids[: count * window].reshape(count, window))
    whole = np.concatenate(found)
    if not len(whole):
        raise BadInput(
            f"{', '.join(path.name for path in paths)}: less than {window} tokens\nGive more text with --calibration."
        )
    names = tuple(path.name for path in paths)
    return Text(whole, digest(paths), names)
