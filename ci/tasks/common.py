"""What the tasks share: how one is declared, the settings that make passes on, how a tool is run.

An option that is not given takes the variable of its name from the environment, which is how make passes them on: a
prompt goes from the user's shell to the tokenizer without being read by another shell.
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
    "model_dir": "the folder of its checkpoint, where there is no network (MODEL_DIR)",
    "prompt": "what to ask (PROMPT, default the model's own)",
    "out": "the folder of the bundles (OUT, default out)",
    "parallel": "layers compiled at a time (PARALLEL, default one for each core)",
    "force": "replace a bundle that was made otherwise (FORCE=1)",
    "args": "more flags for the command underneath, as in a shell (ARGS)",
    "engine": "auto, docker or local: where the compiler runs (ENGINE, default auto)",
    "base_image": "a Debian image to build on (BASE_IMAGE, default one made here by mmdebstrap)",
    "mirror": "where the base image's packages come from (MIRROR, default Debian's own)",
    "record": "write down the packages that were found, instead of holding them against the record",
    "backend": "cpu, or pulsar2 for the vendor's compiler in VENDOR_IMAGE (BACKEND, default cpu)",
    "peer": f"what to measure beside: {', '.join(PEERS)} (PEER, default none)",
    "report": "write docs/benchmarks.md and the README's table from the run (REPORT=1)",
    "extra": f"one of {', '.join(SETS)}; may be repeated (default all)",
    "tag": "what git calls the release; it has to be v and the VERSION of both packages",
    "upgrade": "take the newest versions instead of keeping those that are locked",
    "board": "one of ci/boards/*.yaml, or a labgrid environment of your own",
    "disk": "the virtual board's disk for releases, e.g. 64M, empty at each start (default: this machine's)",
    "even_if_held": "do it although somebody holds the board: what they do there may fail, a night turns red",
    "keep": "releases to keep on the board, the current one among them",
    "bundle": "a bundle that was built elsewhere, in place of a build",
    "history": "the folder of the nights that were held (default OUT/nightly/history)",
    "wait": "seconds to wait for a board that somebody else holds (default 0)",
    "limit": "seconds a stage may take, e.g. measure=600; may be repeated",
    "retry": "--no-retry: do not try once more what the network or the board did",
    "bisect": "name the commit that made a night red, by building and measuring those since the last green one",
    "notify": "a command that gets a note on stdin once per change of state (NIGHTLY_NOTIFY)",
    "soak": "ask axrun serve 1000 questions, in place of 40",
    "renew": "send the known bundle of the health check anew",
    "requests": "how many questions to ask (default 1000)",
    "matrix": "a TOML of boards, models and weight types: a night for each, boards at the same time (ci/matrix.toml)",
    "built": "the folder of a build that boards share, in place of a build (what --matrix gives its nights)",
    "summary": "a file for the night's verdict and figures, as JSON",
    "into": "the folder of the site (default HISTORY/site)",
    "targets": "what figures are to reach (default ci/targets.toml)",
    "maker": "who made the axmodels: cpu or pulsar2 (default cpu)",
    "nights": "how many of the last nights to record from (default 5)",
    "json": "one JSON object on stdout, and nothing else there",
    "command": "what to run there, as its shell reads it (default: a session)",
    "port": "the port on this machine's loopback (default: any that is free)",
    "fresh": "throw the virtual board's old disk away",
}


def verb(body: Callable[..., None]) -> Any:
    """An Invoke task whose failures are `error: ...` and an exit code, never a traceback."""

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
    """A number that an option may have. Raises BadInput."""
    if not least <= value <= most:
        raise BadInput(f"{option} {value}: expected {least} to {most}")
    return value


def succeed(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Call a command of ours in this process; what it had to say about a failure, it has said."""
    sys.stdout.flush()
    finish(main(argv))


def finish(code: int) -> None:
    if code:
        raise Exit(code=code)


def command(name: str, *args: str) -> tuple[list[str], dict[str, str]]:
    """A tool of the environment: its words, and an environment that no variable of make reaches."""
    made = {*SETTINGS, *CONTAINER_SETTINGS, "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
    return [sys.executable, "-m", name, *args], {key: value for key, value in os.environ.items() if key not in made}


def tool(name: str, *args: str) -> None:
    """Run a tool of the environment over the checkout."""
    argv, environment = command(name, *args)
    sys.stdout.flush()
    if code := subprocess.run(argv, cwd=ROOT, env=environment, check=False).returncode:
        raise Exit(code=code)


def suite(*args: str, none_is_fine: bool = False) -> None:
    """Run tests; that none was selected is a failure, unless `none_is_fine` as of the half that flags left empty."""
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


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
