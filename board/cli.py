"""axrun: the runner's commands. Each verb is a function of another module; here are flags and what is printed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from board.errors import BadInput, Failure

VERSION = "0.1.0"
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "repetition_penalty", "penalty_window")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.verb is None:
        parser.print_help()
        return 2
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        VERBS[arguments.verb].command(arguments)
        sys.stdout.flush()
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        return 1
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="axrun",
        description="Runs axmodel bundles on Axera boards and on any CPU.",
        epilog="start with:\n  axrun run out/tiny-qwen2 --prompt '1+1='",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"axrun {VERSION}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    for name, verb in VERBS.items():
        verb.flags(
            verbs.add_parser(
                name,
                help=verb.summary,
                description=verb.summary,
                epilog=verb.examples,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


def _engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", default="ort", help="what executes axmodels (default ort: onnxruntime)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each usable CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, and nothing else there")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    add("--prompt", required=True, metavar="TEXT", help="what to ask; - reads it from stdin")
    add("--system", metavar="TEXT", help="system message, for a bundle with a chat template")
    add("--raw", action="store_true", help="give the prompt to the model as it is, without the chat template")
    add("--max-tokens", type=int, metavar="N", help="longest answer (default: to the end of the context)")
    add("--greedy", action="store_true", help="always the likeliest token, whatever post_config.json says")
    add("--temperature", type=float, metavar="T", help="0 is greedy, 1 the model's own distribution")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that have probability P together")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--repetition-penalty", type=float, metavar="R", help="above 1 makes recent tokens less likely")
    add("--penalty-window", type=int, metavar="N", help="how many tokens back the penalty looks")
    add("--seed", type=int, default=0, metavar="N", help="of the draws: same seed, same answer (default 0)")
    add("--verify", action="store_true", help="first hold every file against the manifest")
    _engine_flags(parser)


def _run(arguments: argparse.Namespace) -> None:
    from board.run import Question, run

    answer = run(
        arguments.bundle,
        Question(
            prompt=_stdin() if arguments.prompt == "-" else arguments.prompt,
            system=arguments.system,
            raw=arguments.raw,
            max_tokens=arguments.max_tokens,
            greedy=arguments.greedy,
            sampling={key: getattr(arguments, key) for key in SAMPLING_FLAGS},
            seed=arguments.seed,
        ),
        verify=arguments.verify,
        engine=arguments.engine,
        threads=arguments.threads,
        say=_say,
        progress=_progress,
        write=_silent if arguments.json else _write,
    )
    if arguments.json:
        print(json.dumps(answer.json(), ensure_ascii=False))


def _model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="an .axmodel")
    add("--group", type=int, metavar="G", help="one shape group (default: each)")
    add("--warmup", type=int, default=3, metavar="N", help="runs before the clock starts (default 3)")
    add("--repeat", type=int, default=20, metavar="N", help="runs that are timed (default 20)")
    _engine_flags(parser)


def _model(arguments: argparse.Namespace) -> None:
    from board.latency import measure

    latencies = measure(
        arguments.file, arguments.group, arguments.warmup, arguments.repeat, arguments.engine, arguments.threads
    )
    if arguments.json:
        print(json.dumps({"file": str(arguments.file), "groups": [latency._asdict() for latency in latencies]}))
        return
    print(f"{arguments.file}: {arguments.repeat} runs of each group, milliseconds")
    print("group  tokens  history       min       max       avg    median")
    for entry in latencies:
        figures = "".join(f"{ms:10.3f}" for ms in (entry.min_ms, entry.max_ms, entry.avg_ms, entry.median_ms))
        print(f"{entry.group:5}{entry.tokens:8}{entry.history:9}{figures}")


def _stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"stdin is not UTF-8 at byte {error.start}") from None
    return text[:-1] if text.endswith("\n") else text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress(line: str) -> None:
    """One line that changes on a terminal, a line each elsewhere. `[n/n]` is the last."""
    if not sys.stderr.isatty():
        _say(line)
        return
    done, _, total = line[1:].partition("]")[0].partition("/")
    print(f"\r\x1b[K{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silent(text: str) -> None:
    pass


class Verb(NamedTuple):
    """A command of axrun."""

    flags: Callable[[argparse.ArgumentParser], None]
    command: Callable[[argparse.Namespace], None]
    summary: str
    examples: str


VERBS = {
    "run": Verb(
        _run_flags,
        _run,
        "Ask a bundle one question. The answer goes to stdout, everything else to stderr.",
        "examples:\n"
        "  axrun run out/tiny-qwen2 --prompt '1+1='\n"
        "  axrun run out/qwen2-0.5b --prompt 'Why is the sky blue?' --temperature 0.7 --top-p 0.8 --seed 1\n"
        "  echo 'Once upon a time' | axrun run out/qwen2-0.5b --prompt - --raw --max-tokens 50 > story.txt",
    ),
    "model": Verb(
        _model_flags,
        _model,
        "Time one axmodel, shape group by shape group.",
        "examples:\n"
        "  axrun model out/tiny-qwen2/qwen2_post.axmodel\n"
        "  axrun model out/qwen2-0.5b/qwen2_p128_l0_together.axmodel --group 0 --repeat 100 --threads 1 --json",
    ),
}
