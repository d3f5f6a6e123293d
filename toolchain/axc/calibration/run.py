"""Calibrates a checkpoint layer by layer, then its head.

Each layer runs twice on the text: with its inputs in the float model, and with the outputs of the quantised layers
before it. The inputs of its linears decide their levels (`axc.quantizer.gptq`). Finished layers are written to disk: a
calibration that was killed resumes after the last one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from torch import nn

from axc import config, reference
from axc.calibration import bits, cache, file, head, text
from axc.calibration.file import Calibrated, CalibrationFile
from axc.calibration.linears import SMALLEST_BLOCK, Matrix, energies
from axc.calibration.options import Options, first_kept
from axc.calibration.streamed import INSTEAD, Call, Streamed, run
from axc.checkpoints import EMBEDDING, HEAD, Checkpoint
from axc.compile import weights
from axc.families.family import ModelConfig
from axc.quantizer import gptq
from axc.weights import Source, float32
from axrun.errors import BadInput
from axrun.format.quantised import unpack4

Tensor = Any  # torch.Tensor
THREADS = 2  # fixed: the number decides the order of summation
PARTS = ".layers"
FAST, SLOW = 4e11, 6e10  # operations a second: with units for bfloat16, and with AVX2

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]


@dataclass
class Seen:
    """Sums over the inputs x of some linears [in, in]: of x xT, and of (y - x) xT where y are the float model's."""

    hessian: Tensor
    drift: Tensor
    modules: list[str] = field(default_factory=list)


@dataclass
class Inputs:
    """Hidden states [count, 1, n, hidden] before a layer: in the float model, and behind the quantised layers.

    `given` is None where both are the same. One tensor each: as one per window, between the temporary tensors of the
    layers, they kept glibc from reusing those (0.9 GB at 896 dimensions).
    """

    exact: Tensor
    given: Tensor | None
    call: Call


def calibrate(
    options: Options, output: Path, progress: Progress = lambda *_: None, say: Say = lambda line: None
) -> Path:
    """Writes the calibration file of a checkpoint. Raises BadInput."""
    checkpoint = Checkpoint.open(options.input_path, options.lora)
    model = config.load(checkpoint, options.model_config, options.model_type, say)
    checkpoint = checkpoint.tied() if model.tie_word_embeddings else checkpoint
    if kept := first_kept(checkpoint, options.weight_type):
        raise BadInput(
            f"{checkpoint.path} is quantised already: {options.weight_type} keeps its levels ({kept.packed}) exactly\n"
            "Build it without calibration, or calibrate the float checkpoint that it was made from."
        )
    window = min(options.window, model.context)
    try:
        tokenizer = reference.tokenizer(options.input_path)
    except reference.Refused as refused:
        raise BadInput(f"{str(refused).partition(chr(10))[0]}\nCalibration needs one: {INSTEAD}") from None
    words = text.windows(options.calibration, tokenizer, options.tokens, window, model.vocab_size)
    return on(words, checkpoint, model, options, output, progress, say)


def on(
    words: text.Text,
    checkpoint: Checkpoint,
    model: ModelConfig,
    options: Options,
    output: Path,
    progress: Progress = lambda *_: None,
    say: Say = lambda line: None,
) -> Path:
    """The same for a tokenised text. `checkpoint` is `tied` where the model is."""
    sources = weights(model)
    header = {
        "version": file.VERSION,
        "tools": cache.tools(),
        "checkpoint": file.checkpoint_digest(checkpoint, sources),
        "text": {
            "sha256": words.sha256,
            "files": list(words.names),
            "tokens": words.tokens,
            "window": words.windows.shape[1],
        },
        "algorithm": {"name": "gptq", "damp": gptq.DAMP, "drift": gptq.DRIFT, **options.decided()},
    }
    with _exactly():
        streamed = Streamed(checkpoint, model, options.model_config)
        if streamed.twin:
            kind = streamed.twin.config["model_type"]
            say(f"transformers has no {model.model_type}: calibrated as a {kind}, which computes the same")
        found, others = matrices(sources, streamed, options)
        last = head.find(sources, streamed)
        if last is not None and head.is_kept(last, checkpoint):
            last = None
        elif last is None:
            others.append(HEAD)
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            say(f"not calibrated, rounded to nearest: {others[0]}{more}")
        ids = torch.from_numpy(words.windows)
        say(_estimate(model, found, words.tokens))
        if options.bits is not None:
            found = bits.choose(streamed, found, ids, options.bits, progress)
        size = {matrix.name: matrix.source.shape[0] * matrix.source.shape[1] for matrix in found}
        average = sum(matrix.bits * size[matrix.name] for matrix in found) / sum(size.values())
        header["bits"] = round(average, 4)
        if last is not None:
            found = [*found, last]
        key = {**header, "weights": [[matrix.name, matrix.weight_type, matrix.block] for matrix in found]}
        with _parts(output, key) as parts:
            _all(streamed, found, ids, parts, progress)
            return _join(parts, header, output)


def matrices(sources: Mapping[str, Source], streamed: Streamed, options: Options) -> tuple[list[Matrix], list[str]]:
    """The matrices that a linear of transformers' layers computes, and the names of the others.

    Raises BadInput if there are none.
    """
    linears = {
        f"{streamed.prefix}.{index}.{name}.weight": index
        for index, layer in enumerate(streamed.layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    found: list[Matrix] = []
    others: list[str] = []
    for name, source in sources.items():
        if len(source.shape) != 2 or name in (EMBEDDING, HEAD):
            continue
        made, block = streamed.pieces(name, source), options.block
        while source.shape[1] % block:
            block //= 2
        layers = {linears.get(piece.name) for piece in made or []}
        if made is None or len(layers) != 1 or None in layers or block < SMALLEST_BLOCK:
            others.append(name)
            continue
        (layer,) = layers
        found.append(Matrix(name, source, made, int(layer or 0), options.weight_type, block))
    if not found:
        raise BadInput(f"{streamed.checkpoint.path}: no matrix can be calibrated\nUse --quantizer rtn.")
    return found, others


def _all(streamed: Streamed, matrices: list[Matrix], ids: Tensor, parts: Path, progress: Progress) -> None:
    """Quantises layer after layer, then the head; each becomes a file in `parts`."""
    of_layer = defaultdict(list)
    for matrix in matrices:
        of_layer[matrix.layer].append(matrix)
    exact, calls = streamed.enter(ids)
    given = exact.clone()
    layers, total = len(streamed.layers), len(streamed.layers) + 1
    with torch.no_grad():
        for index in range(layers):
            path = parts / f"{index}.safetensors"
            finished = _finished(path)
            progress(index, total, f"layer {index + 1} of {layers}{'' if finished is None else ', kept'}")
            layer = streamed.load(index)
            own, prefix = of_layer[index], f"{streamed.prefix}.{index}."
            if finished is not None:
                for at, hidden in enumerate(exact):
                    exact[at] = run(layer, calls[index], hidden)
                _put_all(finished, own, layer, prefix)
            else:
                _save(
                    path,
                    _quantise(streamed, layer, prefix, own, Inputs(exact, given if index else None, calls[index])),
                )
            if index + 1 < layers or of_layer[layers]:
                for at, hidden in enumerate(given):
                    given[at] = run(layer, calls[index], hidden)
            streamed.release(layer)
            _trim()
        del exact
        for last in of_layer[layers]:
            progress(layers, total, "head")
            path = parts / f"{layers}.safetensors"
            if _finished(path) is None:
                _save(path, head.quantise(streamed, last, given))
    progress(total, total, "writing")


def _trim() -> None:
    """Returns freed memory to the system. glibc keeps it, in pieces that do not fit the next tensors."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _join(parts: Path, header: Mapping[str, Any], output: Path) -> Path:
    """The calibration file, from those of the layers."""
    arrays: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    for path in sorted(parts.glob("*.safetensors")):
        arrays |= load_file(path)
        listed |= CalibrationFile.open(path).listed()
    file.save(output, arrays, {**header, "weights": listed})
    shutil.rmtree(parts)
    return output


def _quantise(
    streamed: Streamed,
    layer: Any,
    prefix: str,
    matrices: list[Matrix],
    inputs: Inputs,
) -> dict[str, tuple[Any, Any, Calibrated]]:
    """Levels and scales of a layer's matrices; the layer gets their values. `inputs.exact` becomes its outputs."""
    targets = {piece.name.removeprefix(prefix).removesuffix(".weight") for m in matrices for piece in m.pieces}
    seen = _observe(layer, sorted(targets), inputs)
    _trim()  # inverting the widest Hessian takes most memory
    group_of = {name: at for at, group in enumerate(seen) for name in group.modules}
    batches: dict[tuple[Any, ...], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        orders = {None if piece.columns is None else piece.columns.tobytes() for piece in matrix.pieces}
        groups = {group_of[piece.name.removeprefix(prefix).removesuffix(".weight")] for piece in matrix.pieces}
        if len(groups) != 1 or len(orders) != 1:
            raise BadInput(f"{matrix.name} is computed from several inputs\nUse --quantizer rtn.")
        batches[(*groups, *orders, matrix.weight_type, matrix.block)].append(matrix)
    result = {}
    for (at, _, weight_type, block), batch in batches.items():
        group, columns = seen[at], batch[0].pieces[0].columns
        hessian, drift = group.hessian, group.drift
        if columns is not None:
            index = torch.from_numpy(columns)
            hessian, drift = hessian[index][:, index], drift[index][:, index]
        rows = [torch.from_numpy(float32(m.name, m.source, streamed.checkpoint)) for m in batch]
        whole = torch.cat(rows)
        try:
            levels, scales = gptq.quantize(whole, hessian, file.TYPES[weight_type], block, drift)
        except (ValueError, RuntimeError) as error:
            raise BadInput(f"{batch[0].name} cannot be calibrated: {error}\nUse --quantizer rtn.") from None
        sizes = [len(part) for part in rows]
        for matrix, own, part, scale in zip(batch, rows, levels.split(sizes), scales.split(sizes), strict=True):
            stored = gptq.dequantize(part, scale)
            difference = stored - own
            entry = matrix.calibrated(energies(difference, hessian), energies(own, hessian))
            result[matrix.name] = (*gptq.as_arrays(part, scale), entry)
            put(layer, prefix, matrix, stored)
    return result


def _observe(layer: Any, targets: list[str], inputs: Inputs) -> list[Seen]:
    """Sums over the inputs of a layer's linears, one for each distinct input. `inputs.exact` becomes the outputs."""
    caught: dict[str, Tensor] = {}
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: caught.__setitem__(name, arguments[0])
        )
        for name in targets
    ]
    groups: list[Seen] = []
    try:
        for at, hidden in enumerate(inputs.exact):
            outputs = run(layer, inputs.call, hidden)
            wanted = {name: _flat(x) for name, x in caught.items()}
            if not groups:
                groups = _grouped(caught)
            if inputs.given is not None:
                caught.clear()
                run(layer, inputs.call, inputs.given[at])
            for group in groups:
                x = _flat(caught[group.modules[0]])
                group.hessian.addmm_(x.T, x)
                if inputs.given is not None:
                    group.drift.addmm_((wanted[group.modules[0]] - x).T, x)
            caught.clear()
            inputs.exact[at] = outputs  # now: without a norm before it, a linear's input is `hidden` itself
    finally:
        for hook in hooks:
            hook.remove()
    return groups


def _grouped(caught: dict[str, Tensor]) -> list[Seen]:
    by_input: dict[int, Seen] = {}
    for name, x in caught.items():
        width = x.shape[-1]
        group = by_input.setdefault(id(x), Seen(torch.zeros(width, width), torch.zeros(width, width)))
        group.modules.append(name)
    return list(by_input.values())


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def put(layer: Any, prefix: str, matrix: Matrix, values: Tensor) -> None:
    """Writes the values of an axmodel's matrix into the linears of transformers that it is made of."""
    start = 0
    for piece in matrix.pieces:
        weight = layer.get_submodule(piece.name.removeprefix(prefix).removesuffix(".weight")).weight
        own = values[start : start + len(piece.rows)] / piece.factor
        start += len(piece.rows)
        rows = torch.from_numpy(piece.rows)
        if piece.columns is None:
            weight.data[rows] = own
        else:
            weight.data[rows[:, None], torch.from_numpy(piece.columns)[None]] = own


def _save(path: Path, result: Mapping[str, tuple[Any, Any, Calibrated]]) -> None:
    arrays = {}
    for name, (levels, scales, entry) in result.items():
        arrays[name], arrays[f"{name}_scale"] = file.packed(levels, entry.type), scales
    listed = {name: asdict(entry) for name, (*_, entry) in result.items()}
    file.save(path, arrays, {"version": file.VERSION, "weights": listed})


def _finished(path: Path) -> Mapping[str, Any] | None:
    """Levels and scales that an earlier run wrote; None where it did not, or a power cut damaged them."""
    try:
        CalibrationFile.open(path)
    except BadInput:
        return None
    return load_file(path)


def has_finished_layers(output: Path) -> bool:
    """Whether an interrupted calibration left layers that the next one continues with."""
    return any(output.with_name(output.name + PARTS).glob("*.safetensors"))


def _put_all(arrays: Mapping[str, Any], matrices: list[Matrix], layer: Any, prefix: str) -> None:
    for matrix in matrices:
        levels, scales = arrays[matrix.name], arrays[f"{matrix.name}_scale"]
        whole = unpack4(levels).reshape(len(levels), -1) if matrix.weight_type == "s4" else levels
        values = gptq.dequantize(torch.from_numpy(whole).float(), torch.from_numpy(scales).float())
        put(layer, prefix, matrix, values)


@contextlib.contextmanager
def _parts(output: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of finished layers, for one process at a time; those of another calibration are removed.

    Raises BadInput.
    """
    folder = output.with_name(output.name + PARTS)
    whole = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    marker = folder / "key"
    try:
        if output.is_dir():
            raise BadInput(f"{output} is a folder\nName the file to write.")
        if folder.exists() and not marker.is_file():
            raise BadInput(f"{folder} is in the way\nMove it away, or choose another file.")
        folder.mkdir(parents=True, exist_ok=True)
        lock = marker.open("a+", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another process is writing {output}\nWait for it, or choose another file.") from None
        lock.seek(0)
        if lock.read() != whole:
            for path in folder.iterdir():
                if path != marker:
                    path.unlink()
            lock.truncate(0)
            lock.write(whole)
            lock.flush()
        yield folder


def _estimate(model: ModelConfig, found: list[Matrix], tokens: int) -> str:
    """Expected time and memory, as text."""
    shapes = [(matrix.layer, *matrix.source.shape) for matrix in found]
    inputs = {(layer, columns) for layer, _, columns in shapes}
    widest = max(columns for _, columns in inputs)
    layer = max(sum(rows * columns for at, rows, columns in shapes if at == index) for index, _ in inputs)
    memory = 450e6 + 4 * (3 * layer + 8 * widest**2 + 2 * tokens * model.hidden_size)
    work = sum(6 * rows * columns * tokens for _, rows, columns in shapes)
    work += sum(4 * tokens * columns**2 + 2 * columns**3 for _, columns in inputs)
    fast, slow = work / FAST, work / SLOW
    minutes = slow > 30
    spent = f"{fast / 60 + 1:.0f} to {slow / 60 + 2:.0f} minutes" if minutes else f"{fast + 1:.0f} to {slow + 10:.0f} s"
    return f"calibration on {tokens} tokens: about {spent} on 2 cores, {memory / 1e9:.1f} GB of memory"


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """A fixed number of threads, and matrix products in bfloat16 where the CPU has units for it."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
