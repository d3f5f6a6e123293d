"""Typed, bounded access to the untrusted JSON that describes how weights are stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

FLOAT_CHECKPOINT = "Give the original float checkpoint."


def keys(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


# how AutoRound made the weights, which it adds to every format that it writes
AUTO_ROUND = keys(
    """
    autoround_version provider amp batch_size dataset enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input
    gradient_accumulate_steps iters low_gpu_mem_usage low_cpu_mem_usage lr minmax_lr nsamples scale_dtype seqlen
    block_name_to_quantize to_quant_block_names quant_block_list modules_to_not_convert modules_in_block_to_quantize
    quant_nontext_module enable_alg_ext not_use_best_mse act_group_size act_sym act_dynamic act_data_type model_free
    """
)


@dataclass(frozen=True)
class Settings:
    """A JSON object of the file `path`, named `where` in messages that end with `advice`."""

    values: dict[str, Any]
    path: Path
    where: str
    advice: str = FLOAT_CHECKPOINT

    def refuse(self, key: str, expected: str) -> BadInput:
        """The error for the value of a key."""
        return BadInput(f"{self.path}: {self.where} has {key} {self.values.get(key)!r:.60}; {expected}\n{self.advice}")

    def only(self, key: str, *expected: Any, absent: Any = None) -> Any:
        """The value of a key, which must be one of `expected`; `absent` if it is missing or null."""
        value = self.values.get(key)
        value = absent if value is None else value
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in expected):
            raise self.refuse(key, f"expected {' or '.join(repr(one) for one in expected)}")
        return value

    def flag(self, key: str, absent: bool) -> bool:
        return bool(self.only(key, True, False, absent=absent))

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(key, f"expected a whole number from {low} to {high}")
        return value

    def group_size(self) -> int:
        """Columns that share a scale; -1: all."""
        value = self.values.get("group_size")
        if value == -1 and not isinstance(value, bool):
            return -1
        return self.integer("group_size", 1, 1 << 24)

    def part(self, key: str, where: str) -> Settings:
        """A nested object."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.refuse(key, "expected an object")
        return Settings(value, self.path, where, self.advice)

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Raises BadInput for unknown keys: they may change what the stored numbers mean."""
        odd = sorted(key for key, value in self.values.items() if key not in known and value is not None)
        if odd:
            raise self.refuse(odd[0], "what that means for the stored weights is not known")
