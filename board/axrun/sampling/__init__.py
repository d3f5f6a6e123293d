"""Sampling settings. Logits pass through a list of processors; a token is then sampled from the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from axrun.errors import BadInput

if TYPE_CHECKING:
    from axrun.sampling.budget import Budget
    from axrun.sampling.grammar import Grammar

# key: (types, condition, description of valid values)
RULES: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "temperature": ((int, float), lambda value: value == 0 or 1e-3 <= value <= 100, "0 (greedy) or 0.001 to 100"),
    "repetition_penalty": ((int, float), lambda value: 0 < value <= 100, "a number above 0, up to 100 (1: off)"),
    "penalty_window": ((int,), lambda value: value >= 0, "a whole number of at least 0"),
    "top_p": ((int, float), lambda value: 0 < value <= 1, "a number above 0, up to 1 (1: off)"),
    "top_k": ((int,), lambda value: value >= 0, "a whole number of at least 0 (0: off)"),
    "min_p": ((int, float), lambda value: 0 <= value <= 1, "a number from 0 to 1 (0: off)"),
    "typical_p": ((int, float), lambda value: 0 < value <= 1, "a number above 0, up to 1 (1: off)"),
    "top_n_sigma": ((int, float), lambda value: 0 <= value <= 1000, "a number from 0 to 1000 (0: off)"),
    "xtc_probability": ((int, float), lambda value: 0 <= value <= 1, "a number from 0 to 1 (0: off)"),
    "xtc_threshold": ((int, float), lambda value: 0 < value <= 1, "a number above 0, up to 1"),
    "dry_multiplier": ((int, float), lambda value: 0 <= value <= 100, "a number from 0 to 100 (0: off)"),
    "dry_base": ((int, float), lambda value: 1 <= value <= 4, "a number from 1 to 4"),
    "dry_allowed_length": ((int,), lambda value: 1 <= value <= 64, "a whole number from 1 to 64"),
    "presence_penalty": ((int, float), lambda value: -100 <= value <= 100, "a number from -100 to 100 (0: off)"),
    "frequency_penalty": ((int, float), lambda value: -100 <= value <= 100, "a number from -100 to 100 (0: off)"),
}
# narrower rules for what a user asks for, as in OpenAI's API; files may have more
ASKED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: value <= 2, "0 (greedy) or 0.001 to 2"),
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty"), (lambda value: -2 <= value <= 2, "a number from -2 to 2 (0: off)")
    ),
}
# settings that turn greedy decoding into sampling
TRUNCATING = ("top_p", "top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability")
BREAKERS = ("\n", ":", '"', "*")  # texts that no repetition extends across, as in other runners
POST_CONFIG = ("temperature", "repetition_penalty", "penalty_window", "top_p", "top_k")
# keys of post_config.json that enable a value
SWITCHES = {
    "enable_temperature": "temperature",
    "enable_repetition_penalty": "repetition_penalty",
    "enable_top_p_sampling": "top_p",
    "enable_top_k_sampling": "top_k",
}


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are greedy.

    `penalty_window`: number of recent tokens, of prompt and answer, that the repetition penalty applies to (None: all).
    `presence_penalty` is subtracted from the logits of tokens that are in the answer, `frequency_penalty` once for each
    occurrence. `logit_bias` is added by token id. Tokens in `suppress` are never sampled. `min_p` is the minimum
    probability of a token relative to that of the most likely one. `grammar`: the answer follows it. `budget`
    limits the tokens of its thoughts.
    `typical_p`, `top_n_sigma` and `xtc_*` are in `axrun.sampling.truncate`, `dry_*` in `axrun.sampling.dry`;
    `dry_breakers` are token ids.
    Raises BadInput for a value out of range.
    """

    temperature: float = 0.0
    repetition_penalty: float = 1.0
    penalty_window: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int | None = None
    dry_breakers: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    suppress: tuple[int, ...] = ()
    grammar: Grammar | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        for name in RULES:
            value = getattr(self, name)
            if not (name == "penalty_window" and value is None):
                _check(name, value)

    @classmethod
    def from_post_config(cls, config: Mapping[str, Any]) -> Sampling:
        """Settings from the vendor's post_config.json. All nine keys are checked, whether enabled or not.

        top_p takes precedence over top_k; with neither, sampling is greedy whatever the temperature.
        Raises BadInput naming a key that is missing, unknown or out of range.
        """
        expected = [*SWITCHES, *POST_CONFIG]
        unknown, missing = sorted(set(config) - set(expected)), [key for key in expected if key not in config]
        if unknown or missing:
            what = f"has unknown keys {unknown}" if unknown else f"lacks {missing}"
            raise BadInput(f"post_config.json {what}; it has these: {', '.join(expected)}")
        for key in SWITCHES:
            if not isinstance(config[key], bool):
                raise BadInput(f"{key} is {config[key]!r}, expected true or false")
        for key in POST_CONFIG:
            _check(key, config[key])
        on = {key: config[key] for switch, key in SWITCHES.items() if config[switch]}
        drawn = {key: on[key] for key in ("top_p", "top_k") if key in on}
        return cls(
            temperature=on.get("temperature", 1.0) if drawn else 0.0,
            repetition_penalty=on.get("repetition_penalty", 1.0),
            penalty_window=config["penalty_window"],
            **dict(list(drawn.items())[:1]),
        )

    def override(self, **given: Any) -> Sampling:
        """A copy with the given values that are not None. One of TRUNCATING without a temperature turns greedy decoding
        into sampling at temperature 1. Raises BadInput for a value out of range, also of ASKED.
        """
        given = {key: value for key, value in given.items() if value is not None}
        for key, (holds, words) in ASKED.items():
            if key in given and not holds(given[key]):
                raise BadInput(f"{key} is {given[key]!r:.60}, expected {words}")
        if any(given.get(key) for key in TRUNCATING) and self.temperature == 0:
            given.setdefault("temperature", 1.0)
        return dataclasses.replace(self, **given)


def _check(key: str, value: object) -> None:
    types, holds, words = RULES[key]
    if isinstance(value, bool) or not isinstance(value, types) or not holds(value):
        raise BadInput(f"{key} is {value!r:.60}, expected {words}")
