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
CONVERT = "Give a UTF-8 text with --calibration; iconv converts other encodings."
LONGEST = 64  # characters per token at most: limits what is tokenised of a long text


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
    """Raises BadInput for anything but UTF-8 text."""
    try:
        if not path.is_file() and path.exists():
            raise BadInput(f"{path} is no regular file\nGive a UTF-8 text with --calibration.")
        if path.stat().st_size > MOST:
            raise BadInput(f"{path} is larger than {MOST >> 20} MiB\nA few hundred kilobytes of text suffice.")
        words = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no UTF-8 text: byte {error.start}\n{CONVERT}") from None
    if "\0" in words:
        at = len(words[: words.index("\0")].encode())
        raise BadInput(f"{path} is no text: byte {at} is 0\n{CONVERT}")
    return words


def windows(paths: tuple[Path, ...], tokenizer: Any, tokens: int, window: int, vocabulary: int) -> Text:
    """Of at most `tokens` tokens in all, an equal share from each file. Raises BadInput for too little text."""
    paths = paths or (DEFAULT,)
    share = tokens // len(paths) // window * window
    if not share:
        raise BadInput(f"--calibration_tokens is {tokens}; expected {window} or more for each of {len(paths)} texts")
    found: list[NDArray[np.int64]] = []
    for path in paths:
        ids = np.array(tokenizer.encode(read(path)[: LONGEST * share], add_special_tokens=False), np.int64)
        ids = ids[ids < vocabulary]
        count = min(len(ids), share) // window
        if not count:
            raise BadInput(
                f"{path} has {len(ids)} tokens; expected {window} or more\nGive more text with --calibration."
            )
        found.append(ids[: count * window].reshape(count, window))
    names = tuple(path.name for path in paths)
    return Text(np.concatenate(found), digest(paths), names)
