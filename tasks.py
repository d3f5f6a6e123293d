"""The tasks behind the Makefile's targets; `make` and `invoke --list` list them.

This file has the tasks of the compiler, the tests and the container; ci/tasks has those of boards and nightly runs.
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
    another_prompt,
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
    CLIENTS,
    PEERS,
    PYPI_SIZE,
    SENTENCE_TRANSFORMERS,
    SETS,
    NoTorch,
    SetupFailed,
    engine_beside,
    install,
    install_clients,
    install_peer,
    install_sentence_transformers,
    missing_packages,
)
from requirements.page import TEST_LIB
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
    """Compile a checkpoint into a checked bundle, and run a prompt."""
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
        print(f"\ncontents of {bundle}:\n{inventory(bundle)}\n\nit runs on a board with an NPU")
        return
    chosen = choose(engine)
    print(chosen, flush=True)
    checkpoint = fetch(spec, Path(model_dir).expanduser() if model_dir else None)
    unchecked = "" if chosen.client else without_reference()
    flags = [
        *("--input_path", str(checkpoint), "--output_path", str(bundle)),
        *("--model_name", spec.name, *spec.build.flags()),
        *(
            "--parallel",
            parallel or str(cores()),
            "--check_level",
            "0" if unchecked else str(spec.check_level),
            f"--prompt={question}",
        ),
        *(["--force"] if force else []),
        *more,
    ]
    if chosen.client:
        ready(chosen.client, base_image=BASE_IMAGE, mirror=MIRROR)
        finish(llm_build(chosen.client, flags))
    else:
        from axc.cli import main as axc

        succeed(axc, ["llm_build", *flags])
    print(f"\ncontents of {bundle}:\n{inventory(bundle)}\n", flush=True)
    ask(bundle, question)
    said = (("VENV", str(VENV), str(ROOT / ".venv")), ("MODEL", model, "tiny-qwen2"), ("OUT", out, "out"))
    where = "".join(f" {name}={shlex.quote(value)}" for name, value, usual in said if value != usual)
    if unchecked:
        print(f"\nnot checked against the float32 reference: {unchecked}")
        print(f"to check it: make build{where} TORCH=pypi ({PYPI_SIZE}), or WHEELS=folder with that wheel")
    print(f"\nto run another prompt: make run{where} PROMPT='{another_prompt(spec)}'")


@verb
def run(
    _: Context,
    model: str = MODEL or "tiny-qwen2",
    prompt: str = PROMPT,
    out: str = OUT or "out",
    args: str = ARGS,
) -> None:
    """Run a prompt with a bundle that was built before."""
    from axc.models import find_model

    spec = find_model(model)
    ask(built(spec, out), prompt or spec.prompt, split(args))


@verb
def test(context: Context, args: str = ARGS) -> None:  # noqa: PT028  (a task)
    """Lint and the tests: what every change must pass."""
    more = split(args)
    with engine_beside(VENV):
        install(VENV, "reference", "test", "boards")
        lint(context)
    suite("-n", "2", "-m", "not system", *more)


@verb
def test_all(context: Context, args: str = ARGS) -> None:  # noqa: PT028  (a task)
    """The same as `test`, then the system tests, which need the packages of requirements/system.apt."""
    if packages := missing_packages():
        raise BadInput(f"the system tests need more packages: apt-get install {' '.join(packages)}")
    more = split(args)
    with engine_beside(VENV):
        install(VENV, "reference", "test", "boards")
        install_clients(VENV)
        install_sentence_transformers(VENV)
        bring_page(VENV)
        bring_page(VENV, lib=TEST_LIB, dev=True)
        lint(context)
    suite("-n", "2", "-m", "not system", *more, none_is_fine=bool(more))
    system_tests.run(*more)


@verb
def lint(_: Context) -> None:
    """Run ruff and mypy."""
    install(VENV, "reference", "test")
    tool("ruff", "check", ".")
    tool("ruff", "format", "--check", ".")
    tool("mypy")


@verb
def engine(_: Context, args: str = ARGS) -> None:
    """Build libax_engine for this machine or another."""
    from engine.build import main as build_engine

    succeed(build_engine, split(args))


@verb
def page(_: Context) -> None:
    """Fetch the Markdown libraries of axrun serve's page with npm, at the locked versions."""
    bring_page(VENV)


@verb
def bench(
    _: Context, args: str = ARGS, peer: str = PEER, out: str = OUT or "out", report: bool = REPORT not in ("", "0")
) -> None:
    """Benchmark speed, memory and quality, optionally against a peer; REPORT=1 updates docs/benchmarks.md."""
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
    """Build the pinned container image axc and load it into the Docker daemon."""
    from ci.container import engine
    from ci.container.daemon import connect

    engine.renew(connect(), base_image=base_image, mirror=mirror)


@verb
def base_image(_: Context, out: str = OUT or "out", mirror: str = MIRROR, record: bool = False) -> None:
    """Build the image's base from Debian packages: OUT/axc-base.tar, loaded into the Docker daemon if one runs."""
    from axc.inventory import decimal
    from ci.container import base, engine

    Path(out).mkdir(parents=True, exist_ok=True)
    made = base.make(Path(out) / "axc-base.tar", mirror, renew=record, say=TELL)
    print(f"{made.path}: {made.id}, {decimal(made.nbytes)}, {len(base.Record.read().packages)} packages as recorded")
    print(engine.offer(made, base.TAG))


@verb
def verify_reproducible(_: Context, base_image: str = BASE_IMAGE, mirror: str = MIRROR) -> None:
    """Build image and bundle twice from scratch and compare them byte by byte."""
    from ci.container import reproduce
    from ci.container.daemon import connect

    reproduce.verify(connect(), base_image=base_image, mirror=mirror)


@verb
def wheels(_: Context, out: str = OUT or "out", tag: str = "") -> None:
    """Build the release wheels of axc and axrun (x86-64, aarch64) twice from git's files and compare them."""
    from ci import release

    install(VENV, "build")
    bring_page(VENV)
    for wheel in release.make(Path(out), tag=tag, say=TELL):
        print(wheel)


@verb
def setup(_: Context, extra: Sequence[str] | None = None) -> None:
    """Install all locked requirements, e.g. before going offline."""
    install(VENV, *(extra or (name for name in SETS if name != "page")))  # `page` is for machines without npm
    if not extra:
        try:
            bring_page(VENV)
        except SetupFailed as error:
            print(f"setup: {error}\nwithout them the page of `axrun serve` shows plain text; retry with `make page`")


@verb
def clean(_: Context) -> None:
    """Remove out/ and the caches; keep the environment and downloaded checkpoints."""
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
    """Recompile requirements/*.txt from the .in files and pyproject.toml.

    Files without a .in are maintained by hand. After a change of package.json, update package-lock.json with
    `npm install --package-lock-only` in requirements/.
    """
    from ci.device.wheelhouse import PYTHONS

    for python in PYTHONS:
        tool(
            *("uv", "pip", "compile", "--quiet", "--python-version", python, "--generate-hashes"),
            *("--python-platform", "aarch64-manylinux_2_31", "--custom-compile-command", "invoke lock"),
            *(["--upgrade"] if upgrade else []),
            *("--extra", "grammar", "board/pyproject.toml", "--output-file", f"requirements/board-{python}.txt"),
        )
    overrides = {
        "test": "without-torch.in",
        CLIENTS: "clients-overrides.in",
        SENTENCE_TRANSFORMERS: "sentence-transformers-overrides.in",
    }
    for name in (*SETS, "torch-pypi", *PEERS, CLIENTS, SENTENCE_TRANSFORMERS):
        sources = ["pyproject.toml"] if name == "build" else []
        tool(
            *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"),
            *("--no-emit-package", "axrun", "--custom-compile-command", "invoke lock"),
            *(["--upgrade"] if upgrade else []),
            *(["--override", f"requirements/{overrides[name]}"] if name in overrides else []),
            *(["--no-config"] if name == SENTENCE_TRANSFORMERS else []),  # pyproject.toml excludes scikit-learn
            *(*sources, f"requirements/{name}.in", "--output-file", f"requirements/{name}.txt"),
        )


def without_reference() -> str:
    """Installs the float32 reference (torch); returns why it is not available, empty on success."""
    try:
        install(VENV, "reference")
    except NoTorch as missing:
        reason, *more = str(missing).splitlines()
        print(f"setup: {reason}: building without the check against the reference", flush=True)
        print(*more, sep="\n", flush=True)
        return reason
    return ""


def build_by_vendor(spec: ModelSpec, checkpoint: Path, bundle: Path, flags: tuple[str, ...], *, force: bool) -> None:
    from axc import build, pulsar2
    from ci.container import vendor
    from ci.container.daemon import connect

    if spec.build.calibration:
        raise BadInput(f"models/{spec.name}.toml says {spec.build.calibration[0]}, which pulsar2 does not know")
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
