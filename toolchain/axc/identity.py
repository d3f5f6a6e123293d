"""The identity of the compiler: a digest of all sources that determine a bundle's bytes, and versions of libraries.

A version number is raised by hand, but any commit may change the bytes of a bundle. The digest covers every module of
ours that `axc.build` and `axc.pulsar2` import, found by parsing the sources, and all modules of imported subpackages,
which may be looked up by name. It is the same in a checkout, an installed wheel and the container. Comments count too:
an unnecessary change of the digest costs one build, a missed change would leave a stale bundle in use.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import axc
import axrun
from axc import VERSION

ROOTS = ("axc.build", "axc.pulsar2")
PLACES = MappingProxyType({package.__name__: Path(*package.__path__) for package in (axrun, axc)})
# Third-party packages whose results are written into a bundle, unlike those that only read or compare. The manifest's
# `text` names the package that repaired a tokenizer, if any.
COMPUTING = ("gguf", "numpy")
DIGITS = 16  # of SHA-256, in hexadecimal


@functools.cache
def digest() -> str:
    """The digest of this compiler."""
    return digest_of(PLACES)


def tools() -> dict[str, str]:
    """The compiler's entry in a manifest: versions by name, and the digest."""
    return {"axc": VERSION, "digest": digest(), **{name: metadata.version(name) for name in COMPUTING}}


def digest_of(places: Mapping[str, Path]) -> str:
    """The digest of the sources in `places`: the folder of each package by its name. Raises OSError."""
    whole = hashlib.sha256()
    for name, path in sorted(sources(places).items()):
        text = path.read_bytes().replace(b"\r\n", b"\n")
        whole.update(f"{name} {hashlib.sha256(text).hexdigest()}\n".encode())
    return whole.hexdigest()[:DIGITS]


def sources(places: Mapping[str, Path]) -> dict[str, Path]:
    """The modules of `places` that decide a bundle's bytes, and their files. Raises OSError."""
    found: dict[str, Path] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        path = None if name in found else _file(places, name)
        if path is None:
            continue
        found[name] = path
        waiting += [name.rpartition(".")[0], *_imports(path.read_bytes())]
        if name not in places and path.name == "__init__.py":
            waiting += [f"{name}.{entry.stem}" for entry in path.parent.iterdir() if _is_module(entry)]
    return found


def _is_module(entry: Path) -> bool:
    """Whether an entry of a package's folder is one of its modules or subpackages."""
    return (entry.suffix == ".py" and entry.stem != "__init__") or (entry / "__init__.py").is_file()


def _file(places: Mapping[str, Path], name: str) -> Path | None:
    """The source of a module; None for what is not ours, and for a name that a module defines. Raises OSError."""
    package, *parts = name.split(".")
    if package not in places:
        return None
    path = places[package].joinpath(*parts)
    if (path / "__init__.py").is_file():
        return path / "__init__.py"
    source = path.with_suffix(".py")
    if not source.is_file():
        if name in ROOTS:
            raise FileNotFoundError(2, "axc needs its own sources to compute its digest; missing", str(source))
        return None
    return source


@functools.cache
def _imports(source: bytes) -> tuple[str, ...]:
    """What a source imports anywhere in it: modules, and names of modules that may be submodules."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # never relative, as a test asserts
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)
