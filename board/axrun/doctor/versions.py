"""The stage `versions`: checks board, driver, engine and compiler of the bundle against tables of known versions."""

from __future__ import annotations

from collections.abc import Iterator

from axrun import VERSION
from axrun.doctor import compatibility
from axrun.doctor.compatibility import number
from axrun.doctor.installed import Engine, Installed, look
from axrun.doctor.report import Finding
from axrun.doctor.stages import NotExamined
from axrun.errors import Failure
from axrun.format import axmodel
from axrun.format.bundle import Bundle
from axrun.session import engine_version
from axrun.session.libax_engine import BOARD, EXTENSIONS, FOLDER

STAGE = "versions"
LIBRARY = "libax_engine.so"
OURS = "cpu"  # `maker` of our own axmodels


def versions(bundle: Bundle, engine: str, installed: Installed | None = None) -> str | Finding:
    """Compares the tools that made a bundle with those that run it here; `engine` is the value of --engine.

    Returns a list of the versions, marked if they are not in the tables. Raises NotExamined for a vendor's bundle on a
    machine without a driver and an engine for it.
    """
    found = _same_compiler(bundle)
    if found:
        return found
    here = look() if installed is None else installed
    found = _ours(bundle, engine, here) if bundle.maker == OURS else _vendors(bundle, here)
    return found or "; ".join(_summary(bundle, engine, here))


def _same_compiler(bundle: Bundle) -> Finding | None:
    """Checks that all axmodels are from the compiler in the manifest."""
    names = [bundle.layer_path(index) for index in range(bundle.layers)] + [bundle.post_path]
    versions = {path.name: axmodel.read(path).version for path in names}
    tools = bundle.manifest["tools"]
    expected = str(tools.get("axc" if bundle.maker == OURS else bundle.maker, ""))
    first = next(iter(versions.values()))
    if bundle.maker == OURS or not expected:
        expected = expected or first
        other = {name: version for name, version in versions.items() if version != expected}
    else:  # the vendor's compiler writes its version in two formats with the same numbers
        other = {name: version for name, version in versions.items() if number(version) != number(first)}
        if number(expected) and number(first) and number(expected) != number(first):
            other = versions
    if not other:
        return None
    name = next(iter(other))
    return Finding(
        STAGE,
        f"{name} was made by another compiler than that in the manifest",
        name,
        expected,
        other[name] or "no version",
        "an axmodel of another build was copied into the bundle",
        "Build the bundle again.",
    )


def _ours(bundle: Bundle, engine: str, here: Installed) -> Finding | None:
    if engine == "ort":
        return None
    if here.ours is None:
        return Finding(
            STAGE,
            "no engine for axmodels of axc",
            LIBRARY,
            f"{LIBRARY} of axrun {VERSION} next to the package, or in the folder given by {FOLDER}",
            "none",
            "axrun was installed from a wheel without an engine for this machine, or from source",
            "Install the wheel for this machine, or run `make engine`; --engine ort needs no library.",
        )
    if here.ours.fault:
        return _does_not_load(here.ours, here)
    if here.ours.extensions != EXTENSIONS:
        seen = f"{here.ours.version!r} with extensions {here.ours.extensions}"
        other = "is of another release of axrun" if here.ours.extensions else "is not axc's, which its axmodels need"
        return Finding(
            STAGE,
            "the engine does not belong to this axrun",
            f"{here.ours.folder}/{LIBRARY}",
            f"extensions {EXTENSIONS}, as in axrun {VERSION}",
            seen,
            f"the library {other}",
            f"Unset {FOLDER}, or install axrun again.",
        )
    return None


def _vendors(bundle: Bundle, here: Installed) -> Finding | None:
    engine = here.vendors
    if engine is None and not here.bsp:
        raise NotExamined(f"made by {bundle.maker} for an NPU: this machine has no driver and no engine for one")
    if engine is None:
        return Finding(
            STAGE,
            "no engine for the NPU",
            f"{BOARD}/{LIBRARY}",
            f"{LIBRARY} of the board's BSP ({here.bsp})",
            "none",
            "the BSP's libraries are not mounted or were removed",
            f"Install /soc of the BSP again, or set {FOLDER} to the folder with its libraries.",
        )
    if engine.fault:
        return _does_not_load(engine, here)
    if engine.extensions:
        return Finding(
            STAGE,
            "axc's engine is installed instead of the vendor's",
            f"{engine.folder}/{LIBRARY}",
            "the vendor's library, which drives the NPU",
            engine.version,
            f"{FOLDER} points to axc's library, or that was copied over the vendor's",
            f"Unset {FOLDER}; the vendor's library is in {BOARD}.",
        )
    return _chip(bundle, here) or _too_old(bundle, here)


def _chip(bundle: Bundle, here: Installed) -> Finding | None:
    built, chip = bundle.flag("chip"), here.chip
    if not built or not chip or built == chip:
        return None
    return Finding(
        STAGE,
        "built for another chip",
        bundle.layer_file.replace("%d", "0"),
        f"axmodels for {chip}, as this board's {here.chip_type or 'engine'} needs",
        f"axmodels for {built}",
        "built with another --chip",
        f"Build the bundle with --chip {chip}.",
    )


def _too_old(bundle: Bundle, here: Installed) -> Finding | None:
    seen = number(here.bsp)
    for least in compatibility.NEEDED:
        if seen and here.chip == least.chip and seen < least.version:
            version = _words(least.version)
            return Finding(
                STAGE,
                f"the BSP is too old for language models on {least.chip}",
                "/proc/ax_proc/version",
                f"{version} or newer",
                here.bsp,
                least.below,
                f"Update the board's system to BSP {version} or newer.",
            )
    return None


def _does_not_load(engine: Engine, here: Installed) -> Finding:
    causes = {
        "wrong ELF class": f"built for another machine than this {here.machine}",
        "invalid ELF header": "it is not a library: the copy was cut short, or it is a text file",
        "file too short": "the copy was cut short",
        "GLIBC": f"built for a newer C library than this {here.libc}",
        "libax_interpreter": "libax_interpreter.so is missing beside it",
        "cannot open shared object file": "a library it depends on is missing",
    }
    cause = next((cause for word, cause in causes.items() if word in engine.fault), "damaged, or for another system")
    return Finding(
        STAGE,
        "the engine does not load",
        f"{engine.folder}/{LIBRARY}",
        f"{LIBRARY} for {here.machine}, {here.libc}",
        engine.fault,
        cause,
        "Install it again: from the board's BSP for the vendor's library, from the axrun wheel for ours.",
    )


def _summary(bundle: Bundle, engine: str, here: Installed) -> Iterator[str]:
    yield f"made by {bundle.compiler}"
    if bundle.maker == OURS:
        yield f"axrun {VERSION}, engine {_running(engine, here)}"
    else:
        yield from _vendors_summary(bundle, here)
    yield f"Python {here.python}, {here.libc}, {here.machine}"
    if here.bsp:
        yield f"BSP {here.bsp}{_unknown(number(here.bsp), compatibility.BSPS.get(here.chip, ()))}"
        yield f"chip {here.chip_type or 'unknown'}" + ("" if here.chip else ": not in the table")
    else:
        yield (
            "no BSP: not an Axera board" if bundle.maker == OURS else "no driver: /proc/ax_proc/version does not exist"
        )


def _vendors_summary(bundle: Bundle, here: Installed) -> Iterator[str]:
    assert here.vendors is not None
    known = compatibility.ENGINES.get(here.chip, ())
    yield f"axrun {VERSION}, engine {here.vendors.version}{_unknown(number(here.vendors.version), known)}"
    pulsar2 = axmodel.read(bundle.layer_path(0)).version or str(bundle.manifest["tools"].get(bundle.maker, ""))
    version = number(pulsar2)
    yield f"Pulsar2 {pulsar2 or 'of an unknown version'}{_unknown(version, compatibility.PULSAR2)}"
    if version and version < compatibility.LEAST_LLM_PULSAR2:
        yield f"no language model compiled with Pulsar2 before {_words(compatibility.LEAST_LLM_PULSAR2)} is known"
    if not bundle.flag("chip"):
        yield "the manifest has no chip"
    for least in compatibility.SHOWS_BFLOAT16:
        if least.chip == here.chip and here.bsp and number(here.bsp) < least.version:
            yield f"an engine before {_words(least.version)} {least.below}; axrun handles that"


def _running(engine: str, here: Installed) -> str:
    if engine == "ort":
        try:
            return f"ort {engine_version(engine)}"
        except Failure as failure:
            raise NotExamined(str(failure).partition("\n")[0]) from None
    assert here.ours is not None
    return f"{here.ours.version}, extensions {here.ours.extensions}"


def _unknown(version: compatibility.Version, table: tuple[compatibility.Version, ...]) -> str:
    return "" if version and compatibility.known(version, table) else " (not in the table: compatibility unknown)"


def _words(version: compatibility.Version) -> str:
    return ".".join(map(str, version[:3])) + "".join(f"_P{patch}" for patch in version[3:4])
