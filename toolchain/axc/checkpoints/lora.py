"""Merges LoRA adapters saved by peft as rows are read: W + weight * (lora_alpha / r) * B A in float32.

https://huggingface.co/docs/peft/developer_guides/lora . Products are summed elementwise in the order of r: the
same bits on every machine, unlike a BLAS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints import safetensors
from axc.checkpoints.folder import ADAPTER_CONFIG, refuse_lfs_pointer
from axc.checkpoints.json_files import read_config_json
from axc.checkpoints.quantised.matrix import Floats, widened
from axc.checkpoints.settings import Settings, keys
from axc.stored import EMBEDDING, HEAD, Rows, StoredTensor, loaded_name
from axrun.errors import BadInput

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ADVICE = "Merge it with peft, merge_and_unload(), and give the result as --input_path."
AGAIN = "The adapter is damaged; get it again."
# names, versions, training options. fan_in_fan_out concerns Conv1D, which no supported architecture has; peft ignores
# it for other layers.
HARMLESS = keys(
    """
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules
    lora_dropout layers_to_transform layers_pattern megatron_core eva_config corda_config qalora_group_size
    runtime_config fan_in_fan_out
    """
)
# change the result unless null, false or empty
OFF = keys(
    """
    modules_to_save use_dora megatron_config trainable_token_indices velora_config alora_invocation_tokens use_qalora
    monteclora_config layer_replication lora_bias target_parameters use_bdlora arrow_config kasa_config lora_ga_config
    loftq_config ensure_weight_tying
    """
)
OFF_NAMES = {"use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "aLoRA"}
INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights first
MAX_RANK = 1 << 14


class Lora(NamedTuple):
    """The folder of an adapter, and the factor of its change."""

    folder: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """From DIR or DIR:WEIGHT. Raises BadInput."""
        folder, colon, number = text.rpartition(":")
        if not colon or Path(text).is_dir():
            return cls(Path(text))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or not folder:
            raise BadInput(f"--lora is {text!a:.200}; expected DIR or DIR:WEIGHT, e.g. adapter:0.5")
        return cls(Path(folder), weight)

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / ADAPTER_CONFIG, self.folder / WEIGHTS


@dataclass(frozen=True)
class Merged:
    """Rows of a matrix merged with an adapter: `a` [r, in], `b` [out, r]."""

    base: Callable[[int, int], NDArray[Any]]
    dtype: str
    a: Floats
    b: Floats
    factor: np.float32

    def __call__(self, start: int, stop: int) -> Floats:
        values = widened(self.base(start, stop), self.dtype)
        change = np.zeros_like(values)
        product = np.empty_like(values)
        with np.errstate(over="ignore", invalid="ignore"):  # refused by the reader
            for column, row in zip(self.b[start:stop].T, self.a, strict=True):
                change += np.multiply(column[:, None], row, out=product)
            change *= self.factor
            values += change
        return values


NameOf = Callable[[str], str | None]


def merge(
    adapter: Lora, tensors: Mapping[str, StoredTensor], rows: Callable[[str, int, int], NDArray[Any]], name_of: NameOf
) -> tuple[dict[str, StoredTensor], dict[str, Rows]]:
    """The tensors that an adapter changes, and their readers by key. Raises BadInput.

    `rows` reads rows of a tensor of the base. `name_of` gives a tensor's name there, None if it is of another part of
    a multimodal model.
    """
    changed: dict[str, StoredTensor] = {}
    readers: dict[str, Rows] = {}
    for module, a, b, factor in _pairs(adapter):
        name = name_of(f"{loaded_name(module)}.weight")
        if name is None:
            continue
        if name in changed:
            raise BadInput(f"{adapter.files[1]} changes {name} twice, under two names\n{AGAIN}")
        base = tensors.get(name)
        if base is None and name == HEAD and EMBEDDING in tensors:
            raise tied_head(adapter)
        if base is None or base.shape != (len(b), a.shape[1]):
            seen = f"the base has {list(base.shape)}" if base else "the base has none"
            raise BadInput(
                f"{adapter.files[1]} changes {module}.weight, [{len(b)}, {a.shape[1]}]; {seen}\n"
                "Give the base model that the adapter was trained on as --input_path."
            )

        def read(start: int, stop: int, name: str = name) -> NDArray[Any]:
            return rows(name, start, stop)

        readers[base.key] = Merged(read, base.dtype, a, b, factor)
        packed = base.packed and f"{base.packed} with an adapter"
        changed[name] = replace(base, dtype="FLOAT", packed=packed, grid=None)
    if not changed:
        raise BadInput(f"{adapter.files[1]} changes only other parts than the text model, which alone is built")
    return changed, readers


def tied_head(adapter: Lora) -> BadInput:
    """The error for a head that is the embedding too: in peft both change, but only once the adapter is merged."""
    return BadInput(
        f"{adapter.files[1]} changes lm_head, which the base ties to its embedding: merged by peft, both would change\n"
        f"Give a base with a head of its own: {HEAD} stored, and tie_word_embeddings false in config.json."
    )


def _pairs(adapter: Lora) -> Iterator[tuple[str, Floats, Floats, np.float32]]:
    """Each module's name, A [r, in], B [out, r], and the factor of their product. Raises BadInput."""
    config, weights = adapter.files
    if not config.is_file():
        raise BadInput(f"{config} is missing\nGive the folder of a peft adapter as --lora.")
    settings = Settings(read_config_json(config), config, "the adapter", ADVICE)
    _refuse_others(settings)
    if not weights.is_file():
        pickled = " (adapter_model.bin is a pickle, and not read)" if weights.with_suffix(".bin").is_file() else ""
        raise BadInput(f"{weights} is missing{pickled}\nSave the adapter again with peft's save_pretrained().")
    refuse_lfs_pointer(weights)
    stored = {tensor.key: tensor for tensor in safetensors.headers(weights)}
    arrays = safetensors.arrays(weights)
    modules = sorted(key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight"))
    wanted = {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    odd = sorted({*stored} ^ wanted)
    if odd or not modules:
        what = f"has {odd[0]}" if odd and odd[0] in stored else f"lacks {odd[0]}" if odd else "holds no lora_A"
        raise BadInput(f"{weights} {what:.200}; expected pairs of lora_A.weight and lora_B.weight\n{ADVICE}")
    targets = _targets(settings)
    for module in modules:
        a, b = (stored[f"{module}.lora_{part}.weight"] for part in "AB")
        if not module.startswith(PREFIX):
            raise BadInput(
                f"{weights} has {a.key:.200}, which does not begin with {PREFIX}: peft ignores it\n"
                "Save the adapter again with peft's save_pretrained()."
            )
        name = module.removeprefix(PREFIX)
        if targets is not None and not targets.match(name):
            raise BadInput(
                f"{weights} changes {name}, which target_modules of {config.name} does not name: peft would ignore it\n"
                f"{AGAIN}"
            )
        rank = _of_module(settings, "rank_pattern", name, settings.integer("r", 1, MAX_RANK))
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
            raise settings.refuse("rank_pattern", f"expected whole numbers from 1 to {MAX_RANK}")
        fits = len(a.shape) == 2 and len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank
        if not fits or {a.dtype, b.dtype} - {"FLOAT", "FLOAT16", "BFLOAT16"}:
            raise BadInput(
                f"{weights}: {module} has A {a.dtype}{list(a.shape)} and B {b.dtype}{list(b.shape)}; expected floats "
                f"of rank {rank}\n{AGAIN}"
            )
        alpha = _of_module(settings, "alpha_pattern", name, settings.values.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise settings.refuse("lora_alpha", "expected a number")
        scale = alpha / math.sqrt(rank) if settings.flag("use_rslora", False) else alpha / rank
        first, second = (widened(arrays[tensor.key], tensor.dtype) for tensor in (a, b))
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise BadInput(
                f"{weights}: {module} holds a value that is not finite\nThe adapter is damaged; get it again."
            )
        with np.errstate(over="ignore"):
            factor = np.float32(adapter.weight * scale)
        if not np.isfinite(factor):
            raise BadInput(f"{config}: {name} is scaled by {adapter.weight * scale:g}, too large for float32\n{AGAIN}")
        yield name, first, second, factor


def _refuse_others(settings: Settings) -> None:
    """Raises BadInput for anything but plain LoRA."""
    read = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights")
    settings.refuse_unknown((*HARMLESS, *OFF, *read))
    settings.only("peft_type", "LORA")
    settings.only("bias", "none", absent="none")
    settings.only("init_lora_weights", *INITIAL, absent=True)
    for key in OFF:
        value = settings.values.get(key)
        if value is not None and value is not False and value not in ([], {}):
            named = f"{OFF_NAMES[key]} is not supported" if key in OFF_NAMES else "only plain LoRA is supported"
            raise settings.refuse(key, named)


@dataclass(frozen=True)
class Targets:
    """Matches the modules that an adapter changes, by the rules of peft's `check_target_module_exists`."""

    names: frozenset[str]
    excluded: frozenset[str]
    layers: frozenset[int] | None

    def match(self, module: str) -> bool:
        if _names(self.excluded, module) or not _names(self.names, module):
            return False
        if self.layers is None or module in self.names:
            return True
        number = next((part for part in module.split(".")[2:-1] if part.isdecimal()), None)
        return number is not None and int(number) in self.layers


def _names(names: frozenset[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _targets(settings: Settings) -> Targets | None:
    """None if target_modules is absent, or a regular expression: untrusted ones can take exponential time."""
    names, excluded = settings.values.get("target_modules"), settings.values.get("exclude_modules") or []
    layers = settings.values.get("layers_to_transform")
    if not isinstance(names, list) or not isinstance(excluded, list) or settings.values.get("layers_pattern"):
        return None
    for key, given in (("target_modules", names), ("exclude_modules", excluded)):
        if not all(isinstance(name, str) and name for name in given):
            raise settings.refuse(key, "expected names of modules")
    numbers = [layers] if isinstance(layers, int) else layers or None
    if numbers is not None and not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
        raise settings.refuse("layers_to_transform", "expected numbers of layers")
    return Targets(frozenset(names), frozenset(excluded), None if numbers is None else frozenset(numbers))


def remarks(adapter: Lora, base: Path, tensors: Mapping[str, StoredTensor], name_of: NameOf) -> list[str]:
    """Remarks on an adapter that `merge` accepts: parts not read, missing matrices, no change at all, another base."""
    config, _ = adapter.files
    values = read_config_json(config)
    settings = Settings(values, config, "the adapter", ADVICE)
    pairs = list(_pairs(adapter))
    names = [name_of(f"{loaded_name(module)}.weight") for module, *_ in pairs]
    changed = {name for name in names if name is not None}
    found = []
    if others := len(names) - len(changed):
        many = "1 matrix" if others == 1 else f"{others} matrices"
        found.append(f"--lora {adapter.folder}: it changes {many} of other parts than the text model: not read")
    targets = _targets(settings)
    matrices = [name for name, stored in tensors.items() if len(stored.shape) == 2 and name.endswith(".weight")]
    if targets is not None:
        missing = [name for name in matrices if targets.match(name.removesuffix(".weight")) and name not in changed]
        what = "that target_modules names"
    else:  # expect the modules of one layer in all layers
        kinds = {_kind(name) for name in changed}
        missing = [name for name in matrices if _kind(name) in kinds and name not in changed]
        what = "that other layers have"
        if values.get("layers_to_transform") is not None:
            missing = []
    if missing:
        found.append(
            f"--lora {adapter.folder}: it changes {len(changed)} matrices, and not {len(missing)} more {what} "
            f"({missing[0]}): they stay those of the base"
        )
    if not any(factor and b.any() and a.any() for _, a, b, factor in pairs):
        found.append(f"--lora {adapter.folder}: it changes nothing: all its products are 0")
    named = values.get("base_model_name_or_path")
    if isinstance(named, str) and named and not _same_base(named, base):
        found.append(
            f"--lora {adapter.folder} was trained on {named!r:.120}; that this is {base} "
            "is not checked: shapes alone fit"
        )
    return found


def _kind(name: str) -> str:
    """A tensor's name without its layer number."""
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def _same_base(named: str, base: Path) -> bool:
    """Whether the base that an adapter names appears in the base's path, cache folder or config.json."""
    last = Path(named).name.lower()
    folders = {part.lower() for part in base.resolve().parts}
    return last in folders or f"models--{named.replace('/', '--')}".lower() in folders or last in _said(base)


def _said(base: Path) -> set[str]:
    """The name in config.json of the base."""
    path = base / "config.json"
    name = read_config_json(path).get("_name_or_path") if path.is_file() else None
    return {Path(name).name.lower()} if isinstance(name, str) and name else set()


def _of_module(settings: Settings, key: str, module: str, usual: Any) -> Any:
    """A module's value from a pattern. peft allows regular expressions; only plain names are supported here."""
    patterns = settings.values.get(key) or {}
    if not isinstance(patterns, dict):
        raise settings.refuse(key, "expected an object")
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^").replace("\\.", ".")
        if not plain.replace(".", "").replace("_", "").isalnum():
            raise settings.refuse(key, "of patterns only plain names of modules are read")
        if module == plain or (pattern[0] != "^" and module.endswith(f".{plain}")):
            return value
    return usual
