"""What the Makefile's targets do. Each task composes functions of the rooms; `make` and `invoke --list` list them.

An option that is not given takes the variable of its name from the environment, which is how make passes them on: a
prompt goes from the user's shell to the tokenizer without being read by another shell.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task, task

from board.command import INTERRUPTED
from board.errors import BadInput, Failure
from requirements.install import PEERS, PYPI_SIZE, SETS, NoTorch, SetupFailed, install, install_peer, missing_packages
from requirements.page import bring as bring_page

if TYPE_CHECKING:
    from toolchain.models import ModelSpec

ROOT = Path(__file__).resolve().parent
VENV = Path(sys.prefix)

SETTINGS = ("MODEL", "MODEL_DIR", "PROMPT", "OUT", "PARALLEL", "FORCE", "ARGS", "PEER", "TORCH", "WHEELS")
MODEL, MODEL_DIR, PROMPT, OUT, PARALLEL, FORCE, ARGS, PEER, *_ = (os.environ.get(name, "") for name in SETTINGS)
CONTAINER_SETTINGS = ("ENGINE", "BASE_IMAGE", "MIRROR", "BACKEND", "VENDOR_IMAGE", "VENDOR_SHA256", "VENDOR_LICENCE")
ENGINE, BASE_IMAGE, MIRROR, BACKEND, VENDOR_IMAGE, VENDOR_SHA256, VENDOR_LICENCE = (
    os.environ.get(name, "") for name in CONTAINER_SETTINGS
)

BACKENDS = ("cpu", "pulsar2")

BENCH = ("pytest", "--override-ini=python_files=bench_*.py", "--override-ini=testpaths=tests/bench", "--benchmark-only")
FAILED_TESTS, NO_TESTS = 1, 5  # pytest's exit codes
TELL = functools.partial(print, flush=True)

HELP = {
    "model": "one of models/*.toml (MODEL, default tiny-qwen2)",
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
    "extra": f"one of {', '.join(SETS)}; may be repeated (default all)",
    "upgrade": "take the newest versions instead of keeping those that are locked",
    "board": "one of ci/boards/*.yaml, or a labgrid environment of your own",
    "disk": "the virtual board's disk for releases, e.g. 64M, empty at each start (default: this machine's)",
    "keep": "releases to keep on the board, the current one among them",
    "bundle": "a bundle that was built elsewhere, in place of a build",
    "history": "the folder of the nights that were held (default OUT/nightly/history)",
    "wait": "seconds to wait for a board that somebody else holds (default 0)",
    "limit": "seconds a stage may take, e.g. measure=600; may be repeated",
    "maker": "who made the axmodels: cpu or pulsar2 (default cpu)",
    "nights": "how many of the last nights to record from (default 5)",
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


@verb
def build(
    _: Context,
    model: str = MODEL or "tiny-qwen2",
    model_dir: str = MODEL_DIR,
    prompt: str = PROMPT,
    out: str = OUT or "out",
    parallel: str = PARALLEL,
    force: bool = FORCE not in ("", "0"),
    args: str = ARGS,
    engine: str = ENGINE or "auto",
    backend: str = BACKEND or "cpu",
) -> None:
    """A checkpoint becomes a checked bundle, and the bundle answers."""
    from ci.container.engine import choose, llm_build, ready
    from toolchain.fetch import fetch
    from toolchain.inventory import inventory
    from toolchain.models import load_model

    if backend not in BACKENDS:
        raise BadInput(f"BACKEND is {backend!r}; expected one of {', '.join(BACKENDS)}")
    spec = load_model(model)
    bundle, question = Path(out) / spec.name, prompt or spec.prompt
    more = split(args)
    if backend == "pulsar2":
        if more:
            raise BadInput(
                f"ARGS are for `axc llm_build`; with BACKEND=pulsar2 the flags are those of models/{spec.name}.toml"
            )
        checkpoint = fetch(spec, Path(model_dir).expanduser() if model_dir else None)
        build_by_vendor(spec, checkpoint, bundle, force=force)
        print(f"\n{bundle} holds\n{inventory(bundle)}\n\nit runs on a board with an NPU")
        return
    chosen = choose(engine)
    print(chosen, flush=True)
    checkpoint = fetch(spec, Path(model_dir).expanduser() if model_dir else None)
    unchecked = "" if chosen.client else without_reference()
    flags = [
        *("--input_path", str(checkpoint), "--output_path", str(bundle)),
        *("--model_name", spec.name, *spec.build.flags()),
        *("--parallel", parallel or str(cores()), "--check_level", "0" if unchecked else "2", f"--prompt={question}"),
        *(["--force"] if force else []),
        *more,
    ]
    if chosen.client:
        ready(chosen.client, base_image=BASE_IMAGE, mirror=MIRROR)
        finish(llm_build(chosen.client, flags))
    else:
        from toolchain.cli import main as axc

        succeed(axc, ["llm_build", *flags])
    print(f"\n{bundle} holds\n{inventory(bundle)}\n", flush=True)
    ask(bundle, question)
    said = (("VENV", str(VENV), str(ROOT / ".venv")), ("MODEL", model, "tiny-qwen2"), ("OUT", out, "out"))
    where = "".join(f" {name}={shlex.quote(value)}" for name, value, usual in said if value != usual)
    if unchecked:
        print(f"\nnot checked against the float32 reference: {unchecked}")
        print(f"to check it: make build{where} TORCH=pypi ({PYPI_SIZE}), or WHEELS=folder with that wheel")
    print(f"\nask it more: make run{where} PROMPT='12+30='")


@verb
def run(
    _: Context,
    model: str = MODEL or "tiny-qwen2",
    prompt: str = PROMPT,
    out: str = OUT or "out",
    args: str = ARGS,
) -> None:
    """Ask a bundle that is there."""
    from toolchain.models import load_model

    spec = load_model(model)
    ask(built(spec.name, out), prompt or spec.prompt, split(args))


@verb
def test(context: Context, args: str = ARGS) -> None:  # noqa: PT028  (a task)
    """Everything a change must pass: lint, then the tests."""
    more = split(args)
    install(VENV, "reference", "test")
    lint(context)
    suite("-n", "2", "-m", "not system", *more)


@verb
def test_all(context: Context, args: str = ARGS) -> None:  # noqa: PT028  (a task)
    """The tests of `test`, then those that need the packages of requirements/system.apt too."""
    if packages := missing_packages():
        raise BadInput(f"the system tests need more of this machine: apt-get install {' '.join(packages)}")
    more = split(args)
    install(VENV, "reference", "test", "boards")
    bring_page(VENV)
    lint(context)
    suite("-n", "2", "-m", "not system", *more, none_is_fine=bool(more))
    try:
        suite("-m", "system", *more, none_is_fine=bool(more))
    except Exit as ended:
        if ended.code != FAILED_TESTS:
            raise
        print("error: system tests failed. Once more, those alone: what an emulated board missed in time may pass.")
        suite("-m", "system", "--last-failed", "--last-failed-no-failures=none", *more)


@verb
def lint(_: Context) -> None:
    """Ruff and mypy over everything."""
    install(VENV, "reference", "test")
    tool("ruff", "check", ".")
    tool("ruff", "format", "--check", ".")
    tool("mypy")


@verb
def engine(_: Context, args: str = ARGS) -> None:
    """libax_engine from its sources, for this machine or another."""
    from board.engine.build import main as build_engine

    succeed(build_engine, split(args))


@verb
def page(_: Context) -> None:
    """The Markdown libraries of axrun serve's page, by npm at the locked versions."""
    bring_page(VENV)


@verb
def bench(_: Context, args: str = ARGS, peer: str = PEER) -> None:
    """Speed and memory beside a peer: every bench_*.py of the tests."""
    more = split(args)
    install(VENV, "reference", "test")
    if peer:
        os.environ["LLAMA_PYTHON"] = str(install_peer(peer, VENV))
    tool(*BENCH, "-s", *more)


@verb
def cross(_: Context, board: str = "virtual", out: str = OUT or "out") -> None:
    """The runner and everything it needs, as aarch64 wheels for a board's Python."""
    install(VENV, "boards")
    from ci import place, wheelhouse
    from toolchain.inventory import decimal

    package = wheelhouse.cross(place.find(board).python, Path(out))
    wheels = sorted(package.wheels.iterdir())
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{package.folder}: {len(wheels)} wheels, {decimal(size)}; installed {decimal(package.listing.size)}")


@verb
def board_up(_: Context, board: str = "virtual", disk: str = "", fresh: bool = False) -> None:
    """Start an emulated arm64 board on this machine (root; Debian packages, cached)."""
    install(VENV, "boards")
    from ci import place, virtual_board

    found = place.emulated(board)
    virtual_board.up(found, place.address(found), disk, fresh, TELL)


@verb
def board_down(_: Context, board: str = "virtual") -> None:
    """Cut the emulated board's power; its disk stays."""
    install(VENV, "boards")
    from ci import place, virtual_board

    found = place.emulated(board)
    print(f"{found.name} is off" if virtual_board.down(found) else f"{found.name} was off already")


@verb
def deploy(
    _: Context,
    board: str = "virtual",
    model: str = MODEL or "tiny-qwen2",
    prompt: str = PROMPT,
    out: str = OUT or "out",
    keep: int = 3,
) -> None:
    """Runner and bundle onto a board: sent, verified, asked, and only then switched to."""
    install(VENV, "boards")
    from ci import deploy, evidence, place, wheelhouse
    from toolchain.models import load_model

    spec, found = load_model(model), place.find(board)
    bundle = built(spec.name, out)
    with place.hold(found):
        package = wheelhouse.cross(found.python, Path(out))
        at, record = place.address(found), evidence.place(Path(out), found.name)
        deploy.deploy(found, at, package, bundle, prompt or spec.prompt, keep, TELL, record)


@verb
def rollback(_: Context, board: str = "virtual") -> None:
    """The release before the current one is current again."""
    install(VENV, "boards")
    from ci import deploy, place

    found = place.find(board)
    with place.hold(found):
        deploy.rollback(found, place.address(found), TELL)


@verb
def nightly(
    _: Context,
    board: str = "virtual",
    model: str = MODEL or "tiny-qwen2",
    model_dir: str = MODEL_DIR,
    bundle: str = "",
    out: str = OUT or "out",
    history: str = "",
    wait: int = 0,
    limit: Sequence[str] | None = None,
) -> None:
    """Hold a board, build, deploy, measure, judge by its gates, let go, report: green, or red with the reason."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout begins with the verdict
        install(VENV, "boards", "reference", "test")
    from ci.course import Options, limits
    from ci.nightly import nightly

    options = Options(
        board=board,
        model=model,
        out=Path(out) / "nightly",
        history=Path(history or Path(out) / "nightly" / "history"),
        bundle=Path(bundle) if bundle else None,
        model_dir=Path(model_dir).expanduser() if model_dir else None,
        wait=wait,
        limits=limits(limit or []),
    )
    held = nightly(options, lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(held.lines()), flush=True)
    if held.verdict.code:
        raise Exit(code=held.verdict.code)


@verb
def gate_record(
    _: Context,
    board: str = "virtual",
    model: str = MODEL or "tiny-qwen2",
    maker: str = "cpu",
    nights: int = 5,
    out: str = OUT or "out",
    history: str = "",
) -> None:
    """What the last nights measured becomes what the next must measure."""
    install(VENV, "boards")
    from ci.nightly import record

    print(record(board, model, maker, Path(history or Path(out) / "nightly" / "history"), nights))


@verb
def image(_: Context, base_image: str = BASE_IMAGE, mirror: str = MIRROR) -> None:
    """The pinned container image axc, made here and handed to the Docker daemon."""
    from ci.container import engine
    from ci.container.daemon import connect

    engine.renew(connect(), base_image=base_image, mirror=mirror)


@verb
def base_image(_: Context, out: str = OUT or "out", mirror: str = MIRROR, record: bool = False) -> None:
    """The image's base from Debian packages, as OUT/axc-base.tar and in the Docker daemon if one answers."""
    from ci.container import base, engine
    from toolchain.inventory import decimal

    Path(out).mkdir(parents=True, exist_ok=True)
    made = base.make(Path(out) / "axc-base.tar", mirror, renew=record)
    print(f"{made.path}: {made.id}, {decimal(made.nbytes)}, {len(base.Record.read().packages)} packages as recorded")
    print(engine.offer(made, base.TAG))


@verb
def verify_reproducible(_: Context, base_image: str = BASE_IMAGE, mirror: str = MIRROR) -> None:
    """Image and bundle are built twice from nothing and compared byte by byte."""
    from ci.container import reproduce
    from ci.container.daemon import connect

    reproduce.verify(connect(), base_image=base_image, mirror=mirror)


@verb
def setup(_: Context, extra: Sequence[str] | None = None) -> None:
    """Install the locked requirements, e.g. before going offline."""
    install(VENV, *(extra or (name for name in SETS if name != "page")))  # which only a machine without npm needs
    if not extra:
        try:
            bring_page(VENV)
        except SetupFailed as error:
            print(f"setup: {error}\nuntil `make page` brings them, the page of `axrun serve` shows plain text")


@verb
def clean(_: Context) -> None:
    """Remove out/ and the caches; the environment and downloaded checkpoints stay."""
    caches = (
        "out",
        "build",
        "dist",
        "board/engine/build",
        ".pytest_cache",
        ".mypy_cache",
        ".ruff_cache",
        ".hypothesis",
        ".benchmarks",
    )
    rooms = ("toolchain", "board", "models", "requirements", "tests", "ci")
    compiled = (found for room in rooms for found in (ROOT / room).rglob("__pycache__"))
    for folder in [ROOT / "__pycache__", *(ROOT / name for name in caches), *compiled]:
        shutil.rmtree(folder, ignore_errors=True)


@verb
def lock(_: Context, upgrade: bool = False) -> None:
    """Compile requirements/*.txt anew from the .in files and pyproject.toml; those without one are kept by hand.

    package-lock.json is npm's: `npm install --package-lock-only` in requirements/, after a change of package.json.
    """
    from ci.wheelhouse import PYTHONS

    for python in PYTHONS:
        tool(
            *("uv", "pip", "compile", "--quiet", "--python-version", python, "--generate-hashes"),
            *("--python-platform", "aarch64-manylinux_2_31", "--custom-compile-command", "invoke lock"),
            *(["--upgrade"] if upgrade else []),
            *("board/pyproject.toml", "--output-file", f"requirements/board-{python}.txt"),
        )
    for name in (*SETS, "torch-pypi", *PEERS):
        sources = ["pyproject.toml"] if name == "build" else []
        tool(
            *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"),
            *("--no-emit-package", "axrun", "--custom-compile-command", "invoke lock"),
            *(["--upgrade"] if upgrade else []),
            *(*sources, f"requirements/{name}.in", "--output-file", f"requirements/{name}.txt"),
        )


def built(name: str, out: str) -> Path:
    bundle = Path(out) / name
    if not bundle.is_dir():
        raise BadInput(f"there is no bundle {bundle} yet: make build MODEL={name}")
    return bundle


def without_reference() -> str:
    """Install the reference; returns why there is none, empty where there is."""
    try:
        install(VENV, "reference")
    except NoTorch as missing:
        reason, *more = str(missing).splitlines()
        print(f"setup: {reason}: the build goes on without its check against the reference", flush=True)
        print(*more, sep="\n", flush=True)
        return reason
    return ""


def build_by_vendor(spec: ModelSpec, checkpoint: Path, bundle: Path, *, force: bool) -> None:
    from ci.container import vendor
    from ci.container.daemon import connect
    from toolchain import build, pulsar2

    options = build.Options(
        input_path=checkpoint, output_path=bundle, model_name=spec.name, force=force, **spec.build.given()
    )
    found = vendor.find(connect(), VENDOR_IMAGE, VENDOR_SHA256, VENDOR_LICENCE)
    pulsar2.build(build.plan(options), found)


def ask(bundle: Path, prompt: str, more: Sequence[str] = ()) -> None:
    from board.cli import main as axrun

    succeed(axrun, ["run", str(bundle), f"--prompt={prompt}", *more])


def succeed(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Call a command of ours in this process; what it had to say about a failure, it has said."""
    sys.stdout.flush()
    finish(main(argv))


def finish(code: int) -> None:
    if code:
        raise Exit(code=code)


def tool(name: str, *args: str) -> None:
    """Run a tool of the environment over the checkout, with an environment that no variable of make reaches."""
    made = {*SETTINGS, *CONTAINER_SETTINGS, "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
    environment = {key: value for key, value in os.environ.items() if key not in made}
    sys.stdout.flush()
    if code := subprocess.run([sys.executable, "-m", name, *args], cwd=ROOT, env=environment, check=False).returncode:
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


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


namespace = Collection(
    *(
        found
        for found in list(globals().values())
        if isinstance(found, Task) and found not in (board_up, board_down, gate_record)
    )
)
namespace.add_collection(Collection("board", up=board_up, down=board_down))
namespace.add_collection(Collection("gate", record=gate_record))
