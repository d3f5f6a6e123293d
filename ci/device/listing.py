"""The files of a folder with their sha256, in `sha256sum` format; the hash of that text identifies the folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from axrun.errors import BadInput
from axrun.format.bundle import sha256


@dataclass(frozen=True)
class Listing:
    """Files of a folder, sorted: (path inside it, sha256, size in bytes)."""

    files: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """Hashes every file. Raises BadInput for links and for names that a listing cannot represent."""
        files = []
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BadInput(f"{path} is neither a file nor a folder; only those can be sent to a board")
            if path.is_file():
                if not name.isprintable() or "\\" in name:
                    raise BadInput(f"{folder} has a file {name!a}, a name that cannot be sent to a board")
                files.append((name, sha256(path), path.stat().st_size))
        return cls(tuple(files))

    @property
    def text(self) -> str:
        return "".join(f"{digest}  {name}\n" for name, digest, _ in self.files)

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, _, size in self.files)
