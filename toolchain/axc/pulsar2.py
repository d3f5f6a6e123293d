"""Builds a bundle with the vendor's compiler (pulsar2) instead of ours.

The compiler is closed source and comes as a container image; the caller decides where it runs (`Compiler`). This module
translates the flags, adds the files that it does not write, and checks its axmodels as far as possible without an NPU.
It runs serially, because its parallel builds are reported to produce damaged files, and twice, to detect damage.

Versions up to 5 have `llm_build`, which takes a list of groups; later ones have `llm_build2`, which takes a total
length and makes a group for every step up to it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from axc import budget, bundle, identity, jobs, vendor_flags
from axc.axmodel.writer import Written
from axc.build import Plan, staging_key
from axc.compile import Target
from axc.families.family import ModelConfig
from axc.hf_folder import HfFolder
from axc.jobs import Job, Work
from axc.staging import publish, refuse_other_content, staging
from axrun.errors import BadInput, CheckFailed
from axrun.format.axmodel import Axmodel, Group, TensorInfo, read
from axrun.format.bundle import sha256
from axrun.format.dtypes import FLOATS

MAKER = "pulsar2"
COMMANDS = ("llm_build2", "llm_build")  # in order of preference
NPU_NODE = "neu"  # part of the op_type of the vendor's nodes, one per group
LEAST_SHARE = 0.4  # minimum size relative to our axmodel with the same weight type
WIDEST_SPREAD = 0.1  # maximum relative difference in size of layers with equal shapes
Say = Callable[[str], None]


class Compiler(Protocol):
    """The vendor's compiler, in a container or elsewhere."""

    @property
    def identity(self) -> str:
        """The image id."""

    @property
    def version(self) -> str: ...

    def has(self, command: str) -> bool: ...

    def run(self, arguments: Sequence[str], reads: Path, writes: Path) -> int:
        """Runs `pulsar2 ARGUMENTS` with access to two folders at their own paths; returns its exit code."""


MERGE = "Merge it with peft, merge_and_unload(), and give the result as --input_path."


def build(planned: Plan, compiler: Compiler, say: Say = print) -> dict[str, Any]:
    """Builds the bundle and returns its manifest. Raises BadInput or CheckFailed, and removes all files first."""
    command = next((name for name in COMMANDS if compiler.has(name)), None)
    if command is None:
        raise BadInput(f"{compiler.identity} has none of {', '.join(COMMANDS)}\nIs it the vendor's image?")
    if planned.checkpoint.gguf:
        raise BadInput(f"{planned.checkpoint.path} is a GGUF file, which the vendor's compiler does not read")
    vendor_flags.require(planned.target.vendor, command)
    if planned.checkpoint.adapters:
        raise BadInput(
            f"--lora {planned.checkpoint.adapters[0].folder}: the vendor's compiler merges no adapters\n{MERGE}"
        )
    planned = dataclasses.replace(planned, target=_reachable(planned.target, command, say))
    output = planned.output
    refuse_other_content(output, force=planned.options.force)
    budget.require_disk(2 * planned.budget.disk, output)
    key = {**staging_key(planned), "maker": MAKER, "image": compiler.identity}
    with staging(output, key) as folder:
        what = planned.name, planned.config, planned.target
        made = bundle.write_texts(folder, planned.checkpoint, *what, planned.options.model_config)
        for remark in made.remarks:
            say(remark)
        tries = [folder / name for name in (".first", ".second")]
        for place in tries:
            say(f"{MAKER} {compiler.version}: {command}, {place.name[1:]} run")
            _compile(planned, compiler, command, place)
        _same(*tries)
        say("  both runs gave identical files")
        outputs = {path.name: _checked(planned, path) for path in _axmodels(planned, tries[0])}
        _alike(planned, outputs)
        for name in outputs:
            (tries[0] / name).rename(folder / name)
        for place in tries:
            shutil.rmtree(place)
        manifest = _finish(planned, compiler, folder, made, outputs)
        publish(folder, output, replace=planned.options.force)
    return manifest


def flags(planned: Plan, command: str, output: Path) -> list[str]:
    """Our flags translated for one of its COMMANDS."""
    options, target = planned.options, planned.target
    said: list[tuple[str, object]] = [
        ("--input_path", planned.checkpoint.path),
        ("--output_path", output),
        ("--kv_cache_len", target.kv_cache_len),
        ("--prefill_len", target.prefill_len),
        *(("--last_kv_cache_len", length) for length in target.last_kv_cache_len),
    ]
    if command == "llm_build2":
        said[2:] = [
            ("--max_context", target.kv_cache_len + 1),
            ("--decode_step_size", 0),  # one decode group
            ("--prefill_len", target.groups[-1].history + target.prefill_len if target.prefill_len else 0),
            *([("--prefill_step_size", target.prefill_len)] if target.prefill_len else []),
        ]
    said += [
        ("--hidden_state_type", target.hidden_state_type),
        ("--weight_type", target.weight_type),
        ("--post_weight_type", target.post_weight_type),
        ("--chip", target.chip),
        ("--parallel", 1),
        ("--check_level", 0),
        *([("--post_topk", target.post_topk)] if target.post_topk else []),
        *([("--model_type", options.model_type)] if options.model_type else []),
        *([("--model_config", options.model_config)] if options.model_config else []),
    ]
    more = ["--ret_postnorm"] if target.ret_postnorm else []
    return [*(str(word) for pair in said for word in pair), *more, *target.vendor]


def _reachable(target: Target, command: str, say: Say) -> Target:
    """The target with the groups that `command` can make: llm_build2 makes all steps up to the longest history."""
    if command != "llm_build2" or not target.prefill_len:
        return target
    step, longest = target.prefill_len, max(target.last_kv_cache_len, default=0)
    steps = tuple(range(step, longest + 1, step))
    if longest % step:
        raise BadInput(
            f"{command} prefills in steps of --prefill_len {step}; --last_kv_cache_len {longest} is not a multiple\n"
            f"Give {longest // step * step} or {-(-longest // step) * step}."
        )
    if steps != target.last_kv_cache_len:
        say(f"{command} makes a group for every step: histories {', '.join(map(str, steps))}")
    return dataclasses.replace(target, last_kv_cache_len=steps)


def _compile(planned: Plan, compiler: Compiler, command: str, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if code := compiler.run([command, *flags(planned, command, place)], planned.checkpoint.path, place):
        raise CheckFailed(f"{MAKER} {command} ended with exit code {code}, as shown above\nNothing was kept.")


def _same(first: Path, second: Path) -> None:
    names = sorted({path.name for place in (first, second) for path in place.glob("*.axmodel")})
    for name in names:
        if not all((place / name).is_file() for place in (first, second)):
            raise CheckFailed(f"{MAKER} made {name} in only one of two runs\nNothing was kept.")
        digests = [sha256(place / name) for place in (first, second)]
        if digests[0] != digests[1]:
            raise CheckFailed(
                f"{MAKER} made {name} differently in two runs: sha256 {digests[0][:12]}... and {digests[1][:12]}...\n"
                "Nothing was kept: run it again on a machine with more memory, or ask the vendor."
            )


def _axmodels(planned: Plan, place: Path) -> list[Path]:
    """The axmodels of a bundle. Raises CheckFailed if one is missing or unexpected."""
    target, model = planned.target, planned.config
    wanted = [target.layer_file(model) % index for index in range(model.num_hidden_layers)] + [target.post_file(model)]
    found = {path.name for path in place.glob("*.axmodel")}
    if found != set(wanted):
        odd = sorted(found ^ set(wanted))
        raise CheckFailed(
            f"{MAKER} made {len(found)} axmodels, expected {len(wanted)}: {odd[0]} is "
            f"{'missing' if odd[0] in wanted else 'unexpected'}{f' (and {len(odd) - 1} more)' if len(odd) > 1 else ''}"
        )
    return [place / name for name in wanted]


def _checked(planned: Plan, path: Path) -> Written:
    """Checks an axmodel as far as possible without an NPU. Raises CheckFailed."""
    kind = "post" if path.name == planned.target.post_file(planned.config) else "layer"
    faults = list(_faults(read(path), kind, planned.config, planned.target))
    least = int(LEAST_SHARE * next(job.nbytes for job in planned.jobs if job.kind == kind))
    nbytes = path.stat().st_size
    if nbytes < least:
        faults.append(f"has {nbytes:,} bytes, expected at least {least:,}")
    if faults:
        raise CheckFailed(f"{path.name} {faults[0]}\n{MAKER} made a file that no board could run; nothing was kept.")
    return Written(sha256(path), nbytes)


def _faults(axmodel: Axmodel, kind: str, model: ModelConfig, target: Target) -> Iterator[str]:
    if axmodel.ours:
        yield f"is an axmodel of {axmodel.producer_name}, expected the vendor's"
        return
    groups = target.groups if kind == "layer" else (Group(0, 1, 0),)
    nodes = sum(NPU_NODE in node.op_type.lower() for node in axmodel.nodes)
    if nodes != len(groups):
        yield f"has {nodes} shape groups, expected {len(groups)}"
    seen = {info.name: info for info in (*axmodel.inputs, *axmodel.outputs)}
    for wanted in _layer(model, target) if kind == "layer" else _post(model, target):
        info = seen.get(wanted.name)
        if info is None:
            yield f"has no {wanted.name}, only {', '.join(sorted(seen))[:200]}"
        elif (info.dtype, info.shape) != (wanted.dtype, wanted.shape):
            yield f"has {wanted.name} {info.dtype}{list(info.shape)}, expected {wanted.dtype}{list(wanted.shape)}"


def _layer(model: ModelConfig, target: Target) -> tuple[TensorInfo, ...]:
    """The tensors of the decode group; those of other groups are visible only to the NPU runtime."""
    hid, rows = FLOATS[target.hidden_state_type], target.kv_cache_len
    hidden, width = model.hidden_size, model.kv_size
    return (
        TensorInfo("K_cache", hid, (1, rows, width)),
        TensorInfo("V_cache", hid, (1, rows, width)),
        TensorInfo("indices", "UINT32", (1, 1)),
        TensorInfo("input", hid, (1, 1, hidden)),
        TensorInfo("mask", hid, (1, 1, rows + 1)),
        TensorInfo("K_cache_out", hid, (1, 1, width)),
        TensorInfo("V_cache_out", hid, (1, 1, width)),
        TensorInfo("output", hid, (1, 1, hidden)),
    )


def _post(model: ModelConfig, target: Target) -> tuple[TensorInfo, ...]:
    hid = FLOATS[target.hidden_state_type]
    return (
        TensorInfo("input", hid, (1, 1, model.hidden_size)),
        TensorInfo("output", hid, (1, 1, model.vocab_size)),
    )


def _alike(planned: Plan, outputs: dict[str, Written]) -> None:
    """All layers have the same shapes, so one of a very different size is damaged. Raises CheckFailed."""
    layer = re.compile(re.escape(planned.target.layer_file(planned.config)).replace("%d", r"\d+"))
    sizes = {name: written.nbytes for name, written in outputs.items() if layer.fullmatch(name)}
    usual = sorted(sizes.values())[len(sizes) // 2]
    for name, nbytes in sizes.items():
        if abs(nbytes - usual) > WIDEST_SPREAD * usual:
            raise CheckFailed(f"{name} has {nbytes:,} bytes, other layers {usual:,}: it is damaged; nothing was kept")


def _finish(
    planned: Plan, compiler: Compiler, folder: Path, made: HfFolder, outputs: dict[str, Written]
) -> dict[str, Any]:
    """Writes embedding and manifest, as for our own axmodels."""
    work = Work(planned.checkpoint.path, planned.stamps, folder, planned.config, planned.target)
    done: dict[Job, Written] = {job: jobs.run(work, job) for job in planned.jobs if job.kind in ("embedding", "input")}
    place, adapters = planned.checkpoint.path, planned.checkpoint.adapters
    files = {Path(job.file): written for job, written in done.items() if job.kind == "input"}
    inputs = {bundle.input_name(path, place, adapters): written for path, written in files.items()}
    outputs = {**outputs, **{job.file: written for job, written in done.items() if job.kind == "embedding"}}
    first = read(folder / (planned.target.layer_file(planned.config) % 0))
    tools = {
        **identity.tools(),
        MAKER: compiler.version,
        "image": compiler.identity,
        "producer": f"{first.producer_name} {first.producer_version}".strip(),
    }
    what = planned.name, planned.config, planned.target
    return bundle.finish(folder, *what, made, inputs, outputs, maker=MAKER, tools=tools, pooled=planned.pooled)
