"""The names by which a request may choose one of several bundles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from axrun.errors import BadInput

ALIAS = re.compile(r"[\w.:-]+(/[\w.:-]+)*", re.ASCII)


def aliases_of(paths: Sequence[Path], given: Sequence[str]) -> list[tuple[str, ...]]:
    """The aliases of each bundle, from NAME=DIR. Raises BadInput."""
    folders = [path.resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise BadInput("a bundle is given twice\nGive it another name with --alias NAME=DIR.")
    found: list[list[str]] = [[] for _ in folders]
    for alias in given:
        name, _, place = alias.partition("=")
        folder = Path(place).resolve()
        if not ALIAS.fullmatch(name) or folder not in folders or any(name in names for names in found):
            raise BadInput(f"--alias is {alias!r}, expected NAME=DIR with a new name for one of the bundles")
        found[folders.index(folder)].append(name)
    return [tuple(names) for names in found]


def names_of(paths: Sequence[Path], aliases: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """All names of each bundle, the main one first: that of its folder, and its aliases. Raises BadInput.

    Of several folders of the same name, the only one without an alias has that name; the others have their aliases.
    """
    folders = [path.resolve().name for path in paths]
    taken = {name for names in aliases for name in names}
    found = []
    for folder, names in zip(folders, aliases):
        nameless = [not others for other, others in zip(folders, aliases) if other == folder]
        if folder not in taken and (len(nameless) == 1 or (not names and sum(nameless) == 1)):
            found.append((folder, *names))
        elif names:
            found.append(tuple(names))
        else:
            raise BadInput(f"several bundles are named {folder}\nName them with --alias NAME=DIR.")
    return found
