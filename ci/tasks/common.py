"""Shared by all tasks: the decorator that declares one, the settings passed by make, and running tools.

Options default to the environment variable of their name, which make exports. So a prompt reaches the tokenizer exactly
as typed, without a second shell interpreting it.
"""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.exceptions import Exit
from invoke.tasks import task

from axrun.command import INTERRUPTED
from axrun.errors import BadInput, Failure
from ci.device import commands
from requirements.install import PEERS, SETS, SetupFailed

if TYPE_CHECKING:
    from axc.models import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(sys.prefix)

SETTINGS = ("MODEL", "MODEL_DIR", "PROMPT", "OUT", "PARALLEL", "FORCE", "ARGS", "PEER", "REPORT", "TORCH", "WHEELS")
MODEL, MODEL_DIR, PROMPT, OUT, PARALLEL, FORCE, ARGS, PEER, REPORT, *_ = (os.environ.get(name, "") for name in SETTINGS)
CONTAINER_SETTINGS = ("ENGINE", "BASE_IMAGE", "MIRROR", "BACKEND", "VENDOR_IMAGE", "VENDOR_SHA256", "VENDOR_LICENCE")
ENGINE, BASE_IMAGE, MIRROR, BACKEND, VENDOR_IMAGE, VENDOR_SHA256, VENDOR_LICENCE = (
    os.environ.get(name, "") for name in CONTAINER_SETTINGS
)

TELL = functools.partial(print, flush=True)
FAILED_TESTS, NO_TESTS = 1, 5  # pytest's exit codes

HELP = {
    "model": "one of models/*.toml, or owner/name on the Hugging Face Hub (MODEL, default tiny-qwen2)",
    "model_dir": "the folder of its checkpoint, for a machine without network (MODEL_DIR)",
    "prompt": "the prompt (PROMPT, default that of the model's TOML)",
    "out": "the output folder (OUT, default out)",
    "parallel": "layers compiled in parallel (PARALLEL, default one per core)",
    "force": "replace a bundle that was built with other settings (FORCE=1)",
    "args": "further flags for the underlying command, quoted as for a shell (ARGS)",
    "engine": "auto, docker or local: where the compiler runs (ENGINE, default auto)",
    "base_image": "a Debian base image (BASE_IMAGE, default one made on this machine by mmdebstrap)",
    "mirror": "the Debian mirror for the base image (MIRROR, default Debian's own)",
    "record": "update the record of packages instead of checking against it",
    "backend": "cpu, or pulsar2 for the vendor's compiler in VENDOR_IMAGE (BACKEND, default cpu)",
    "peer": f"a program to compare with: {', '.join(PEERS)} (PEER, default none)",
    "report": "write docs/benchmarks.md and the README's table from the run (REPORT=1)",
    "extra": f"one of {', '.join(SETS)}; may be repeated (default all)",
    "tag": "the release's git tag; must be v and the VERSION of both packages",
    "upgrade": "upgrade to the newest versions instead of keeping the locked ones",
    "board": "one of ci/boards/*.yaml, or a labgrid environment of your own",
    "disk": "the virtual board's disk for releases, e.g. 64M, empty at each start (default: this machine's)",
    "even_if_held": "go on although somebody else holds the board; this can break their run",
    "keep": "releases to keep on the board, including the current one",
    "bundle": "use a bundle that was built elsewhere instead of building one",
    "history": "the folder of past nights (default OUT/nightly/history)",
    "wait": "seconds to wait for a board that somebody else holds (default 0)",
    "limit": "time limit of a stage in seconds, e.g. measure=600; may be repeated",
    "retry": "--no-retry: do not retry failures of the network or the board",
    "bisect": "find the commit that turned a night red, by building and measuring commits since the last green one",
    "notify": "a command to run once per change of state, with the headline on stdin (NIGHTLY_NOTIFY)",
    "soak": "send 1000 requests to axrun serve instead of 40",
    "renew": "deploy the known-good bundle of the health check again",
    "requests": "number of requests (default 1000)",
    "matrix": "run a night for each board, model and weight type of a TOML, boards in parallel (ci/matrix.toml)",
    "built": "the folder of a shared build to use instead of building (--matrix sets it)",
    "summary": "a file for the night's verdict and figures, as JSON",
    "into": "the folder of the site (default HISTORY/site)",
    "targets": "the targets of the figures (default ci/targets.toml)",
    "maker": "who made the axmodels: cpu or pulsar2 (default cpu)",
    "nights": "the number of past nights to record from (default 5)",
    "json": "print one JSON object on stdout and nothing else",
    "command": "a command for the board's shell (default: an interactive session)",
    "port": "the port on this machine's loopback (default: any free one)",
    "fresh": "discard the virtual board's old disk",
}


def verb(body: Callable[..., None]) -> Any:
    """Declares an Invoke task. Its failures print `error: ...` and set the exit code, without a traceback."""

    @functools.wraps(body)
    def run(*args: Any, **options: Any) -> None:
        try:
            body(*args, **options)
        except (Failure, SetupFailed) as error:
            raise Exit(f"error: {error}", code=error.exit_code) from None
        except KeyboardInterrupt:
            raise Exit("interrupted", code=INTERRUPTED) from None

    _, *options = inspect.signature(body).parameters
    described = {name: HELP[name] for name in options}
    return task(help={name.replace("_", "-"): text for name, text in described.items()}, iterable=["extra", "limit"])(
        run
    )


def within(option: str, value: int, least: int, most: int) -> int:
    """Returns `value`. Raises BadInput if it is out of range."""
    if not least <= value <= most:
        raise BadInput(f"{option} {value}: expected {least} to {most}")
    return value


def succeed(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Calls the main function of one of our commands, which reports its errors itself, and exits with its code."""
    sys.stdout.flush()
    finish(main(argv))


def finish(code: int) -> None:
    if code:
        raise Exit(code=code)


def command(name: str, *args: str) -> tuple[list[str], dict[str, str]]:
    """The argv of a Python module of this environment, and the environment variables without make's settings."""
    made = {*SETTINGS, *CONTAINER_SETTINGS, "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
    return [sys.executable, "-m", name, *args], {key: value for key, value in os.environ.items() if key not in made}


def tool(name: str, *args: str) -> None:
    """Runs a Python module of this environment in the checkout."""
    argv, environment = command(name, *args)
    sys.stdout.flush()
    if code := subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode:
        raise Exit(code=code)


def suite(*args: str, none_is_fine: bool = False) -> None:
    """Runs pytest. Selecting no test is a failure unless `none_is_fine`."""
    try:
        tool("pytest", *args)
    except Exit as ended:
        if not (none_is_fine and ended.code == NO_TESTS):
            raise


def split(args: str) -> list[str]:
    try:
        return shlex.split(args)
    except ValueError as error:
        raise BadInput(f"ARGS is {args!r}: {error}; quote it as for a shell") from None


def built(spec: ModelSpec, out: str) -> Path:
    """The bundle of a model. Raises BadInput where there is none yet."""
    bundle = Path(out) / spec.name
    if not bundle.is_dir():
        where = [] if out == "out" else [f"OUT={bundle.parent.absolute()}"]
        raise BadInput(f"there is no bundle {bundle} yet: {commands.make('build', f'MODEL={spec.asked}', *where)}")
    return bundle


def another_prompt(spec: ModelSpec) -> str:
    """A prompt to suggest after the model's own: a sum where that is one, else a question."""
    return "12+30=" if spec.prompt == "1+1=" else "Why is the sky blue?"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
