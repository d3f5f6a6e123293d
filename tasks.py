"""What the Makefile's targets do. Each task composes functions of the rooms; `make` and `invoke --list` list them.

Here are the tasks of the compiler, the tests and the container; those of boards and nights are in ci/tasks.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import Task

from axrun.errors import BadInput
from ci.tasks import boards, nights, system_tests
from ci.tasks.common import (
    ARGS,
    BACKEND,
    BASE_IMAGE,
    ENGINE,
    FORCE,
    MIRROR,
    MODEL,
    MODEL_DIR,
    OUT,
    PARALLEL,
    PEER,
    PROMPT,
    REPORT,
    ROOT,
    TELL,
    VENDOR_IMAGE,
    VENDOR_LICENCE,
    VENDOR_SHA256,
    VENV,
    built,
    cores,
    finish,
    split,
    succeed,
    suite,
    tool,
    verb,
)
from requirements.install import (
    PEERS,
    PYPI_SIZE,
    SETS,
    NoTorch,
    SetupFailed,
    engine_beside,
    install,
    install_peer,
    missing_packages,
)
from requirements.page import bring as bring_page

if TYPE_CHECKING:
    from axc.models import ModelSpec

BACKENDS = ("cpu", "pulsar2")
BENCH = ("pytest", "--override-ini=python_files=bench_*.py", "--override-ini=testpaths=tests/bench", "--benchmark-only")


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
    from axc import vendor_flags
    from axc.fetch import fetch
    from axc.inventory import inventory
    from axc.models import find_model
    from ci.container.engine import choose, llm_build, ready

    if backend not in BACKENDS:
        raise BadInput(f"BACKEND is {backend!r}; expected one of {', '.join(BACKENDS)}")
    spec = find_model(model)
    bundle, question = Path(out) / spec.name, prompt or spec.prompt
    more = split(args)
    if backend == "pulsar2":
        passed_on = vendor_flags.passed_on(more)
        checkpoint = fetch(spec, Path(model_dir).expanduser() if model_dir else None)
        build_by_vendor(spec, checkpoint, bundle, passed_on, force=force)
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
        from axc.cli import main as axc

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
    from axc.models import find_model

    spec = find_model(model)
    ask(built(spec, out), prompt or spec.prompt, split(args))


@verb
def test(context: Context, args: str = ARGS) -> None:  # noqa: PT028  (a task)
    """Everything a change must pass: lint, then the tests."""
    more = split(args)
    with engine_beside(VENV):
        install(VENV, "reference", "test", "boards")
        lint(context)
    suite("-n", "2", "-m", "not system", *more)


@verb
def test_all(context: Context, args: str = ARGS) -> None:  # noqa: PT028  (a task)
    """The tests of `test`, then those that need the packages of requirements/system.apt too."""
    if packages := missing_packages():
        raise BadInput(f"the system tests need more of this machine: apt-get install {' '.join(packages)}")
    more = split(args)
    with engine_beside(VENV):
        install(VENV, "reference", "test", "boards")
        bring_page(VENV)
        lint(context)
    suite("-n", "2", "-m", "not system", *more, none_is_fine=bool(more))
    system_tests.run(*more)


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
    from engine.build import main as build_engine

    succeed(build_engine, split(args))


@verb
def page(_: Context) -> None:
    """The Markdown libraries of axrun serve's page, by npm at the locked versions."""
    bring_page(VENV)


@verb
def bench(
    _: Context, args: str = ARGS, peer: str = PEER, out: str = OUT or "out", report: bool = REPORT not in ("", "0")
) -> None:
    """Speed, memory and quality beside a peer: every bench_*.py of the tests; with REPORT=1 into docs/benchmarks.md."""
    more = split(args)
    install(VENV, "reference", "test")
    if peer:
        os.environ["LLAMA_PYTHON"] = str(install_peer(peer, VENV))
    if not report:
        tool(*BENCH, "-s", *more)
        return
    from ci.benchmarks.report import publish, versions

    run = Path(out) / "benchmarks.json"
    run.parent.mkdir(parents=True, exist_ok=True)
    tool(*BENCH, "-s", f"--benchmark-json={run}", *more)
    settings = [("PEER", peer), ("ARGS", args)]
    command = shlex.join(["make", "bench", "REPORT=1", *(f"{name}={value}" for name, value in settings if value)])
    for path in publish(run, command, versions(os.environ.get("LLAMA_PYTHON"))):
        print(path)


@verb
def image(_: Context, base_image: str = BASE_IMAGE, mirror: str = MIRROR) -> None:
    """The pinned container image axc, made here and handed to the Docker daemon."""
    from ci.container import engine
    from ci.container.daemon import connect

    engine.renew(connect(), base_image=base_image, mirror=mirror)


@verb
def base_image(_: Context, out: str = OUT or "out", mirror: str = MIRROR, record: bool = False) -> None:
    """The image's base from Debian packages, as OUT/axc-base.tar and in the Docker daemon if one answers."""
    from axc.inventory import decimal
    from ci.container import base, engine

    Path(out).mkdir(parents=True, exist_ok=True)
    made = base.make(Path(out) / "axc-base.tar", mirror, renew=record, say=TELL)
    print(f"{made.path}: {made.id}, {decimal(made.nbytes)}, {len(base.Record.read().packages)} packages as recorded")
    print(engine.offer(made, base.TAG))


@verb
def verify_reproducible(_: Context, base_image: str = BASE_IMAGE, mirror: str = MIRROR) -> None:
    """Image and bundle are built twice from nothing and compared byte by byte."""
    from ci.container import reproduce
    from ci.container.daemon import connect

    reproduce.verify(connect(), base_image=base_image, mirror=mirror)


@verb
def wheels(_: Context, out: str = OUT or "out", tag: str = "") -> None:
    """The wheels of axc and axrun, for x86-64 and aarch64, built twice from what git has and compared."""
    from ci import release

    install(VENV, "build")
    bring_page(VENV)
    for wheel in release.make(Path(out), tag=tag, say=TELL):
        print(wheel)


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
    from ci.device.wheelhouse import PYTHONS

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


def build_by_vendor(spec: ModelSpec, checkpoint: Path, bundle: Path, flags: tuple[str, ...], *, force: bool) -> None:
    from axc import build, pulsar2
    from ci.container import vendor
    from ci.container.daemon import connect

    options = build.Options(
        input_path=checkpoint,
        output_path=bundle,
        model_name=spec.name,
        force=force,
        vendor=flags,
        **spec.build.given(),
    )
    found = vendor.find(connect(), VENDOR_IMAGE, VENDOR_SHA256, VENDOR_LICENCE)
    pulsar2.build(build.plan(options), found)


def ask(bundle: Path, prompt: str, more: Sequence[str] = ()) -> None:
    from axrun.cli import main as axrun

    succeed(axrun, ["run", str(bundle), f"--prompt={prompt}", *more])


namespace = Collection(*(found for found in list(globals().values()) if isinstance(found, Task)))
for room in (boards, nights):
    for found in (each for each in vars(room).values() if isinstance(each, Task)):
        first, _, second = found.name.partition("_")  # board_up is board.up
        if not second:
            namespace.add_task(found)
            continue
        if first not in namespace.collections:
            namespace.add_collection(Collection(first))
        namespace.collections[first].add_task(found, second)
