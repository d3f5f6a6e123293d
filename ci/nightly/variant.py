"""Model variants: `tiny-qwen2@s4` is tiny-qwen2 with weight type s4; plain `tiny-qwen2` has its own weight type."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from axc.models import ModelSpec, load_model
from axc.quantizer import WEIGHT_TYPES
from axrun.errors import BadInput


@dataclass(frozen=True)
class Variant:
    """A model of models/*.toml and the weight type to build it with."""

    spec: ModelSpec
    weight_type: str

    @property
    def own(self) -> bool:
        """Whether it is the weight type of the model's TOML, which `make build` uses."""
        return self.weight_type == own_type(self.spec)

    @property
    def name(self) -> str:
        """Its name in commands, history and gates."""
        return self.spec.name if self.own else f"{self.spec.name}@{self.weight_type}"

    def flags(self) -> list[str]:
        """Further flags for axc llm_build, after the model's own."""
        return [] if self.own else ["--weight_type", self.weight_type]


def find(name: str) -> Variant:
    """The variant called `name`. Raises BadInput for an unknown model or weight type."""
    model, at, weight_type = name.partition("@")
    spec = load_model(model)
    return Variant(spec, require_weight_type(weight_type) if at else own_type(spec))


def own_type(spec: ModelSpec) -> str:
    """The weight type that `make build` builds it with."""
    return spec.build.weight_type or "s8"  # which llm_build takes for floats


def require_weight_type(name: str) -> str:
    """Returns `name`. Raises BadInput for an unknown weight type."""
    if name not in WEIGHT_TYPES:
        near = difflib.get_close_matches(name, WEIGHT_TYPES, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise BadInput(f"no weight type is named {name!a:.40}: there are {', '.join(WEIGHT_TYPES)}{meant}")
    return name


def model_of(name: str) -> str:
    """The model part of a variant's name; it need not exist."""
    return name.partition("@")[0]
