"""config.json as untrusted input: typed and bounded access to its keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from axc import config_keys
from axrun.errors import BadInput


class Reader:
    """Typed, bounded access to the keys of config.json; `defaults` has the values of absent keys."""

    def __init__(self, values: dict[str, Any], path: Path, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.values, self.path, self.defaults = values, path, defaults

    def get(self, key: str) -> Any:
        """The value or default of a key. Raises BadInput if it has neither."""
        if key not in self.values and key not in self.defaults:
            raise BadInput(f"{self.path}: {key} is missing, and its default is unknown{self._misspelt(key)}")
        return self.values.get(key, self.defaults.get(key))

    def _refused(self, key: str, why: str) -> BadInput:
        """An error that tells a value in the file from the default of an absent key."""
        value = self.get(key)
        seen = f"{key} is {value!r:.60}" if key in self.values else f"{key} is absent, and its default is {value!r:.60}"
        return BadInput(f"{self.path}: {seen}{why}{self._misspelt(key)}")

    def _misspelt(self, key: str) -> str:
        if key in self.values:
            return ""
        odd = [name for name, near in config_keys.misspelt(self.values, {*self.defaults, key}).items() if near == key]
        return f"\nIt has {odd[0]!r:.60}: did you mean {key!r}?" if odd else ""

    def integer(self, key: str, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._refused(key, f"; expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, *, low: float, high: float) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise self._refused(key, f"; expected a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, *, null: bool | None = None) -> bool:
        """True or false; `null` if the value is null."""
        value = self.get(key)
        value = null if value is None else value
        if not isinstance(value, bool):
            raise self._refused(key, "; expected true or false")
        return value

    def expect(self, key: str, *only: object) -> None:
        value = self.get(key)
        if value not in only:
            raise self._refused(key, f"; this architecture is built with {only[0]!r} only")

    def divisor(self, key: str, of: int) -> int:
        """A divisor of `of`; `of` itself if the value is null."""
        value = of if self.get(key) is None else self.integer(key)
        if of % value:
            raise self._refused(key, f", which does not divide the {of} attention heads")
        return value

    def head_dim(self, hidden: int, heads: int) -> int:
        """head_dim, by default the architecture's or hidden_size / num_attention_heads; even, for rotary embedding."""
        given = self.values.get("head_dim", self.defaults.get("head_dim")) is not None
        if not given and hidden % heads:
            raise self._refused("hidden_size", f", which is not a multiple of num_attention_heads {heads}")
        value = self.integer("head_dim", low=2) if given else hidden // heads
        if value % 2:
            why = "; rotary position embedding needs an even number"
            if given:
                raise self._refused("head_dim", why)
            raise BadInput(f"{self.path}: hidden_size / num_attention_heads is {value}{why}")
        return value
