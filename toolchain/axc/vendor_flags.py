"""Flags of the vendor's `llm_build` and `llm_build2` that mean something to its compiler alone.

With it they are passed on as they are (`axc.pulsar2`); without it they are refused by name, with what to do instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from axrun.errors import BadInput

BOTH = ("llm_build", "llm_build2")


@dataclass(frozen=True)
class VendorFlag:
    """`commands` of the vendor that take it; `instead` is what axc has for it, in words."""

    commands: tuple[str, ...]
    instead: str


FLAGS: Mapping[str, VendorFlag] = MappingProxyType(
    {
        "--npu_mode": VendorFlag(BOTH, "there is no NPU to divide: leave it out"),
        "--tensor_parallel_size": VendorFlag(BOTH, "a model runs on one board, on all its cores: leave it out"),
        "--ld_param_opt": VendorFlag(("llm_build",), "weights are read from the file as they are: leave it out"),
        "--image_size": VendorFlag(("llm_build",), "vision towers are not built: give a language model"),
        "--lora_adapter_path": VendorFlag(("llm_build2",), "give --lora, which takes adapters as peft saves them"),
        "--max_context": VendorFlag(("llm_build2",), "give --kv_cache_len, which is one less"),
        "--prefill_step_size": VendorFlag(("llm_build2",), "give --prefill_len, and --last_kv_cache_len for each step"),
        "--decode_step_size": VendorFlag(("llm_build2",), "all of the context is one decode group: leave it out"),
    }
)
RETURNED = "--ret_postnorm"  # which axc has too
# What the build itself says to the vendor's compiler; said twice, it would be unclear which counts.
OURS = frozenset({"--max_context", "--prefill_step_size", "--decode_step_size"})


class Refuse(argparse.Action):
    """Ends the program: the flag means nothing to the compiler that was called."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None
    ) -> NoReturn:
        parser.error(
            f"{flag} is for the NPU's compiler, and axc compiles for CPUs: {FLAGS[str(flag)].instead}\n"
            f"With the vendor's image: make build BACKEND=pulsar2 ARGS='{flag} ...'"
            if flag not in OURS
            else f"{flag} is the vendor's llm_build2's: {FLAGS[flag].instead}"
        )


def refuse(parser: argparse.ArgumentParser) -> None:
    """Has `parser` know the flags, and refuse them by name."""
    for name in FLAGS:
        parser.add_argument(name, action=Refuse, nargs="?", help=argparse.SUPPRESS)


def passed_on(words: Sequence[str]) -> tuple[str, ...]:
    """`words` (--flag value, or --flag=value) as they go to the vendor's compiler. Raises BadInput for another flag."""
    known = [RETURNED, *sorted(FLAGS.keys() - OURS)]
    found: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            if not found or found[-1] not in known or found[-1] == RETURNED:
                raise BadInput(f"{word!a:.60} stands behind no flag; expected {', '.join(known)}")
            found.append(word)
        elif name not in known:
            raise BadInput(
                f"{name!a:.60} is not passed on to the vendor's compiler; expected {', '.join(known)}\n"
                "The others are said by models/*.toml."
            )
        elif name in found:
            raise BadInput(f"{name} is given twice")
        else:
            found += [name, value] if equals else [name]
    return tuple(found)


def require(words: Sequence[str], command: str) -> None:
    """Raises BadInput for a flag that `command` of the vendor does not take."""
    for name in words:
        if name in FLAGS and command not in FLAGS[name].commands:
            raise BadInput(
                f"{name} is of {' and '.join(FLAGS[name].commands)}; this image has {command}\nLeave it out."
            )
