"""Flags that several commands share, and what they mean: how a bundle is loaded, how an answer is sampled."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from axrun import progress

if TYPE_CHECKING:  # importing numpy and an engine is slow, and --help does not need them
    from axrun.load import Loading
    from axrun.run import Options

JSON_HELP = "print one JSON object on stdout, and nothing else"
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "penalty_window")
# further settings of axrun.sampling: (type, help); their flags have the same names
MORE_SAMPLING: dict[str, tuple[type, str]] = {
    "presence_penalty": (float, "subtracted from the logits of tokens that are in the answer"),
    "frequency_penalty": (float, "subtracted once for each occurrence of the token in the answer"),
    "typical_p": (float, "sample from the most typical tokens with a total probability of X"),
    "top_n_sigma": (float, "sample from logits at most X standard deviations below the largest"),
    "xtc_probability": (float, "probability to exclude all top choices but the last"),
    "xtc_threshold": (float, "least probability of a top choice (default 0.1)"),
    "dry_multiplier": (float, "penalty for continuing a repetition (0: off)"),
    "dry_base": (float, "its growth for each token of the repetition (default 1.75)"),
    "dry_allowed_length": (int, "repetitions shorter than this are free (default 2)"),
}


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    engines = (
        "engine that runs the axmodels: ax (libax_engine, the default if installed), ax-int8 (the same with 8-bit "
        "activations: faster, less exact) or ort (onnxruntime)"
    )
    parser.add_argument("--engine", metavar="NAME", help=engines)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each usable CPU)")


def add_bundle_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The flags of every command that loads a bundle, or `several`."""
    if several:
        what = "bundle folder; of several, the request's model chooses one, and none means the first"
        parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help=what)
    else:
        parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("--verify", action="store_true", help="verify every file against the manifest first")
    parser.add_argument("--force", action="store_true", help="load even if memory seems too small")
    add_speed_flags(parser)


def loading_of(arguments: argparse.Namespace) -> Loading:
    from axrun.load import Loading

    allow = _allow(arguments)
    return Loading(arguments.verify, engine_of(arguments), arguments.threads, allow, say, progress.show)


def add_parse_special_flag(parser: argparse.ArgumentParser, always: str = "") -> None:
    what = "special tokens spelled in a message, e.g. <|im_end|>, are control tokens, not text"
    parser.add_argument("--parse-special", action="store_true", help=what + always)


def add_generation_config_flag(parser: argparse.ArgumentParser) -> None:
    what = "sample with the checkpoint's generation_config.json instead of post_config.json; other flags override it"
    parser.add_argument("--generation-config", action="store_true", help=what)


def add_speculation_flags(parser: argparse.ArgumentParser, one: str = "") -> None:
    what = "decode one token at a time; the default guesses tokens by prompt lookup, which gives the same answer sooner"
    parser.add_argument("--no-speculation", dest="speculation", action="store_false", help=what)
    what = "a smaller bundle with the same tokenizer guesses tokens too; the answer stays the same"
    parser.add_argument("--draft", type=Path, metavar="BUNDLE", help=what + one)


def add_sampling_flags(parser: argparse.ArgumentParser, always_special: str = "") -> None:
    add = parser.add_argument
    add("--system", metavar="TEXT", help="system message; needs a chat template")
    add_parse_special_flag(parser, always_special)
    add_speculation_flags(parser)
    add("--max-tokens", type=int, metavar="N", help="maximum length of the answer (default: to the end of the context)")
    add("--greedy", action="store_true", help="always take the most likely token, whatever post_config.json says")
    add_generation_config_flag(parser)
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature: 0 is greedy, 1 the model's own distribution",
    )
    add("--top-p", type=float, metavar="P", help="sample from the most likely tokens with a total probability of P")
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    add("--min-p", type=float, metavar="P", help="sample from tokens with at least P times the top token's probability")
    add("--repetition-penalty", type=float, metavar="R", help="a value above 1 makes recent tokens less likely")
    add("--penalty-window", type=int, metavar="N", help="number of recent tokens that the penalty applies to")
    for name, (kind, what) in MORE_SAMPLING.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=what)
    add("--seed", type=int, default=0, metavar="N", help="random seed: same seed, same answer (default 0)")


def options_of(arguments: argparse.Namespace) -> Options:
    from axrun.run import Options

    sampling = {key: getattr(arguments, key) for key in (*SAMPLING_FLAGS, *MORE_SAMPLING)}
    if arguments.greedy:
        sampling["temperature"] = 0.0
    return Options(
        arguments.system,
        arguments.max_tokens,
        sampling,
        arguments.seed,
        arguments.parse_special,
        arguments.generation_config,
        arguments.speculation,
        arguments.draft,
        getattr(arguments, "json_schema", None),
        getattr(arguments, "grammar", None),
    )


def engine_of(arguments: argparse.Namespace) -> str:
    from axrun.session import usual_engine

    return arguments.engine or usual_engine()


def _allow(arguments: argparse.Namespace) -> Callable[[str], bool]:
    """The policy if memory seems too small: load with --force, ask on a terminal, else refuse."""

    def forced(shortage: str) -> bool:
        say(f"warning: {shortage}")
        return True

    def asked(shortage: str) -> bool:
        print(f"{shortage}\nLoad it anyway? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    if arguments.force:
        return forced
    return asked if sys.stdin.isatty() and sys.stderr.isatty() else lambda shortage: False


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
