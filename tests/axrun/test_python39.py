"""Code for boards runs on Python 3.9: no newer syntax, modules or arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "board").rglob("*.py"), *(ROOT / "ci" / "device" / "on_board").rglob("*.py")])

# New in 3.10 and later, https://docs.python.org/3/whatsnew/: modules, names in modules, keyword arguments, methods and
# built-in functions.
MODULES = {"tomllib"}
NAMES = {
    "asyncio": {"timeout", "timeout_at", "TaskGroup", "Runner", "Barrier"},
    "contextlib": {"aclosing", "chdir"},
    "dataclasses": {"KW_ONLY"},
    "datetime": {"UTC"},
    "enum": {"StrEnum", "ReprEnum"},
    "hashlib": {"file_digest"},
    "inspect": {"get_annotations"},
    "itertools": {"pairwise", "batched"},
    "math": {"cbrt", "exp2", "sumprod"},
    "operator": {"call"},
    "sys": {"exception", "stdlib_module_names", "monitoring"},
    "types": {"EllipsisType", "NoneType", "NotImplementedType", "UnionType"},
    "typing": {
        *("Concatenate", "LiteralString", "Never", "NotRequired", "ParamSpec", "Required", "Self", "TypeAlias"),
        *("TypeGuard", "TypeVarTuple", "Unpack", "assert_never", "assert_type", "override"),
    },
}
KEYWORDS = {
    "zip": {"strict"},
    "map": {"strict"},
    "dataclass": {"slots", "kw_only", "weakref_slot"},
    "bisect_left": {"key"},
    "bisect_right": {"key"},
    "insort": {"key"},
}
METHODS = {"add_note", "bit_count", "hardlink_to"}
BUILTINS = {"aiter", "anext", "ExceptionGroup", "BaseExceptionGroup", "EncodingWarning"}


def newer(source: str) -> Iterator[str]:
    """Yields uses of features newer than Python 3.9, except in annotations and TYPE_CHECKING blocks."""
    tree = ast.parse(source, feature_version=(3, 9))
    unread = {id(inner) for node in ast.walk(tree) for part in _unread(node) for inner in ast.walk(part)}
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            modules.update((alias.asname or alias.name, alias.name) for alias in node.names)
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            new = NAMES.get(node.module or "", set())
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in new)
        elif isinstance(node, ast.Attribute):
            module = modules.get(node.value.id, "") if isinstance(node.value, ast.Name) else ""
            if node.attr in NAMES.get(module, set()) or node.attr in METHODS:
                yield f"{module}.{node.attr}"
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            used = {keyword.arg for keyword in node.keywords if keyword.arg}
            yield from (f"{called}({keyword}=)" for keyword in sorted(used & KEYWORDS.get(called, set())))
            if called in ("isinstance", "issubclass", "cast", "NewType") and _has_union(node.args[1:]):
                yield f"{called} with |"
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.id
        elif isinstance(node, ast.Assign) and _is_type_union(node.value):
            yield "an alias with |"


def _unread(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        yield from node.body
    for name in ("annotation", "returns"):
        part = getattr(node, name, None)
        if part is not None:
            yield part


def _has_union(parts: list[ast.expr]) -> bool:
    inner = (node for part in parts for node in ast.walk(part))
    return any(isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) for node in inner)


def _is_type_union(value: ast.expr) -> bool:
    """`A = int | None` or `A = Callable[..., int | None]`: a union with | that is evaluated at run time."""
    for node in ast.walk(value):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = (node.left, node.right)
            if any(isinstance(side, ast.Constant) and side.value is None for side in sides):
                return True
            if any(isinstance(side, ast.Name) and side.id in ("int", "str", "float", "bytes") for side in sides):
                return True
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_board_code_runs_on_python_3_9(path: Path) -> None:
    source = path.read_text("utf-8")
    assert list(newer(source)) == []
    if source.strip() and path.name != "__init__.py":
        assert "from __future__ import annotations" in source or "|" not in source


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("match x:\n    case 1: pass", SyntaxError),
        ("try: pass\nexcept* ValueError: pass", SyntaxError),
        ("def f[T](x: T): pass", SyntaxError),
        ("import tomllib", "tomllib"),
        ("from itertools import pairwise", "itertools.pairwise"),
        ("import itertools as i\ni.pairwise(x)", "itertools.pairwise"),
        ("zip(a, b, strict=True)", "zip(strict=)"),
        ("@dataclass(slots=True)\nclass A: pass", "dataclass(slots=)"),
        ("isinstance(x, int | str)", "isinstance with |"),
        ("A = int | None", "an alias with |"),
        ("A = Callable[[], str | None]", "an alias with |"),
        ("(5).bit_count()", ".bit_count"),
        ("anext(x)", "anext"),
    ],
)
def test_newer_features_are_found(source: str, found: str | type[Exception]) -> None:
    if isinstance(found, str):
        assert found in list(newer(source))
    else:
        with pytest.raises(found):
            list(newer(source))


def test_annotations_may_be_newer() -> None:
    source = "from __future__ import annotations\nif TYPE_CHECKING:\n    from typing import TypeGuard\n"
    assert list(newer(source + "x: int | None = 1\ndef f(a: int | str) -> TypeGuard[int]: ...")) == []
