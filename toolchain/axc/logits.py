"""axc reference: writes the logits of a float32 checkpoint over a text, the reference of `axrun eval`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc import VERSION, config, expected_graphs, figures, hf_folder, pooling
from axc import compile as compiler
from axc.bundle import add_file, input_name
from axc.calibration.file import calibrated
from axc.checkpoints import Checkpoint, Lora
from axc.checkpoints.gguf import SUFFIX as GGUF
from axc.existing import CALIBRATION, MODEL_CONFIG
from axc.families.family import ModelConfig
from axrun.errors import BadInput
from axrun.format.bundle import read_manifest, sha256
from axrun.format.logits import NAME, ReferenceLogits
from axrun.measure.evaluate import log_softmax
from axrun.progress import Progress, Show, unseen

if TYPE_CHECKING:
    from axc.reference import Reference

Floats = NDArray[np.float32]
Say = Callable[[str], None]

WINDOW = 512
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
ROWS = 128  # rows of logits per block
MOST_ANSWERS = 16  # greedy continuations, one per window


@dataclass(frozen=True)
class Options:
    """`window` None: 512 tokens, more where `bundle` prefills more, or the context of `bundle`, or the whole text.

    `tokens`: maximum number of tokens of the text. `top_k`: number of log-probabilities stored per position.
    `greedy_tokens`: length of the greedy continuations (0: none). `model_config` replaces the checkpoint's config.json,
    `model_type` a model_type that transformers does not know. `lora`: adapters to merge.
    """

    input_path: Path
    text: Path
    output_path: Path | None = None
    bundle: Path | None = None
    window: int | None = None
    tokens: int = 16384
    top_k: int = 256
    greedy_tokens: int = 32
    model_config: Path | None = None
    model_type: str | None = None
    lora: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        if (self.output_path is None) == (self.bundle is None):
            raise BadInput("give one place to write to: --output_path FILE or --bundle DIR")
        for flag, value, least, most in (
            ("--window", self.window or WINDOW, 2, 1 << 20),
            ("--tokens", self.tokens, 2, 1 << 24),
            ("--top_k", self.top_k, 1, 1 << 24),
            ("--greedy_tokens", self.greedy_tokens, 0, 1 << 16),
        ):
            if not least <= value <= most:
                raise BadInput(f"{flag} is {value}; expected {least} to {most}")


def write(options: Options, show: Show = unseen, say: Say = lambda line: None) -> tuple[Path, ReferenceLogits]:
    """Computes the logits and writes them to a file, or into a bundle and its manifest; returns path and content.

    A bundle also gets the doctor's figures, reported through `say`. Raises BadInput if the checkpoint or the text is
    unusable, or if the bundle was built from another checkpoint.
    """
    manifest = None if options.bundle is None else read_manifest(options.bundle)
    folder = options.input_path
    inputs = {input_name(path, folder, options.lora): sha256(path) for path in _inputs(options, manifest)}
    if manifest is not None:
        _expect_same(manifest, inputs, options)
    logits, reference = compute(options, inputs, {} if manifest is None else manifest["model"], show)
    if options.bundle is not None and manifest is not None:
        add_file(options.bundle, NAME, logits.encode())
        kind = options.model_type or manifest["model"]["model_type"]
        checkpoint = Checkpoint.open(options.input_path, options.lora)
        model = config.load(checkpoint, options.model_config, kind)
        ids, graphs = logits.tokens[0].tolist(), _graphs(checkpoint, model, manifest)
        weights = compiler.weights(model)
        figures.write(options.bundle, options.input_path, reference, ids, weights, show, say, graphs)
        return options.bundle / NAME, logits
    assert options.output_path is not None
    try:
        options.output_path.parent.mkdir(parents=True, exist_ok=True)
        options.output_path.write_bytes(logits.encode())
    except OSError as error:
        raise BadInput(f"cannot write {options.output_path}: {error.strerror or error}") from None
    return options.output_path, logits


def _graphs(checkpoint: Checkpoint, model: ModelConfig, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The graphs that this compiler writes for a bundle that it built itself; None for any other bundle."""
    target = expected_graphs.target(manifest)
    if target is None or not expected_graphs.same_compiler(manifest):
        return None
    return expected_graphs.distinct_graphs(checkpoint, model, target, calibrated(manifest))


def compute(
    options: Options,
    inputs: dict[str, str],
    model: Mapping[str, Any] = MappingProxyType({}),
    show: Show = unseen,
) -> tuple[ReferenceLogits, Reference]:
    """The reference logits of a text in windows of equal length, and the reference; a remainder of the text is unused.

    `model` is the description in a bundle's manifest; it determines the window length if the options do not. Raises
    BadInput.
    """
    text = _text(options.text)  # before the slow import of torch

    import transformers

    from axc.reference import Reference

    ids = _ids(options, text)
    length = options.window or min(_window_of(model), len(ids))
    if len(ids) < length:
        raise BadInput(f"{options.text} has {len(ids)} tokens, expected at least --window {length}")
    windows = np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    remarks = list(_not_reached(model, length))
    prompt = max(length // 2, 1)
    answers = min(len(windows), MOST_ANSWERS) if options.greedy_tokens else 0
    reference = Reference(options.input_path, options.model_config, options.model_type, adapters=options.lora)
    continuations = np.zeros((answers, min(options.greedy_tokens, length - prompt)), np.uint32)
    if continuations.size:
        continuations[:] = reference.generate(windows[:answers, :prompt], continuations.shape[1]).tokens
        show(Progress(answers, answers, "greedy answers"))
    parts = []
    for number, tokens in enumerate(windows):
        logits = reference.logits(tokens)
        vocabulary = logits.shape[1]
        parts.append(_window(logits[:-1], tokens[1:], min(options.top_k, vocabulary)))
        show(Progress(number + 1, len(windows), "windows"))
    kept, logprobs, rest, chosen = (np.stack(column) for column in zip(*parts, strict=True))
    found = ReferenceLogits(
        tokens=windows.astype(np.uint32),
        ids=kept.astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32),
        logprobs=logprobs,
        rest=rest,
        following=chosen,
        continuations=continuations,
        about={
            "model_type": reference.model_type,
            "vocab_size": vocabulary,
            "prompt": prompt,
            "inputs": inputs,
            "remarks": [*remarks, *reference.remarks],
            "text": {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)},
            "tools": {"axc": VERSION, "transformers": transformers.__version__},
        },
    )
    return found, reference


def _window_of(model: Mapping[str, Any]) -> int:
    """The length of a window that leaves the first prefill chunk and crosses every group, within the context."""
    if not model:
        return WINDOW
    history = max((group["history"] for group in model["groups"] if group["tokens"] > 1), default=0)
    return int(min(max(WINDOW, history + model["prefill_len"]), model["kv_cache_len"]))


def _not_reached(model: Mapping[str, Any], length: int) -> Iterator[str]:
    """Remarks on parts of a bundle that windows of this length do not measure."""
    if not model:
        return
    histories = sorted(group["history"] for group in model["groups"] if group["tokens"] > 1)
    if model["prefill_len"] and length <= model["prefill_len"]:
        yield (
            f"windows of {length} tokens never leave the first prefill of {model['prefill_len']}: "
            "K/V history and decode are not measured; give a longer text"
        )
    elif histories and length <= max(histories[:-1], default=0):
        yield f"windows of {length} tokens do not reach the group behind {histories[-1]} rows; give a longer text"


def _inputs(options: Options, manifest: dict[str, Any] | None) -> Iterator[Path]:
    """The checkpoint's files: those that the bundle was built from, or all that make up a model."""
    folder = options.input_path
    for file in (file for adapter in options.lora for file in adapter.files):
        if not file.is_file():
            raise BadInput(f"{file} is missing\nGive the folder of a peft adapter as --lora.")
        yield file
    if folder.suffix == GGUF and folder.is_file():
        yield folder
        return
    if not folder.is_dir():
        raise BadInput(f"no checkpoint folder {folder}\nGive the folder that holds config.json and the weights.")
    files = {*hf_folder.input_files(folder), *pooling.input_files(folder)}
    if manifest is not None and isinstance(manifest.get("inputs"), dict):
        files |= {folder / name for name in manifest["inputs"] if "/" not in name and name != CALIBRATION}
    else:
        files |= {path for pattern in WEIGHTS for path in folder.glob(pattern)}
    yield from (path for path in sorted(files) if path.is_file())


def _text(path: Path) -> bytes:
    """A text, in UTF-8. Raises BadInput."""
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}\nGive a text file in UTF-8 as --text.") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}\nConvert it, e.g. with iconv -t UTF-8.") from None
    return text


def _ids(options: Options, text: bytes) -> list[int]:
    """Token ids of the text by AutoTokenizer, at most `tokens` of the options."""
    from axc.reference import tokenizer

    ids = list(tokenizer(options.input_path).encode(text.decode("utf-8")))[: options.tokens]
    if len(ids) < 2:
        raise BadInput(f"{options.text} has {len(ids)} tokens, expected at least 2\nGive a longer text.")
    return ids


Columns = tuple[NDArray[np.int64], Floats, Floats, Floats]


def _window(logits: Floats, following: NDArray[np.int64], top: int) -> Columns:
    """ids [n, K], their log-probabilities, the log of the other mass [n], the log-probability of what follows [n]."""
    found = [
        _rows(log_softmax(logits[start : start + ROWS]), following[start : start + ROWS], top)
        for start in range(0, len(logits), ROWS)
    ]
    ids, logprobs, rest, chosen = (np.concatenate(column) for column in zip(*found, strict=True))
    return ids, logprobs, rest, chosen


def _rows(logprobs: NDArray[np.float64], following: NDArray[np.int64], top: int) -> Columns:
    vocabulary = logprobs.shape[1]
    ids = np.argpartition(logprobs, vocabulary - top, axis=1)[:, vocabulary - top :]
    kept = np.take_along_axis(logprobs, ids, axis=1)
    order = np.lexsort((ids, -kept), axis=1)  # ties in the order of ids
    ids, kept = np.take_along_axis(ids, order, axis=1), np.take_along_axis(kept, order, axis=1)
    others = np.exp(logprobs)
    np.put_along_axis(others, ids, 0.0, axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(others.sum(axis=1))
    chosen = np.take_along_axis(logprobs, following[:, None], axis=1)[:, 0]
    return ids, kept.astype(np.float32), rest.astype(np.float32), chosen.astype(np.float32)


def _expect_same(manifest: dict[str, Any], inputs: dict[str, str], options: Options) -> None:
    """Raises BadInput if the bundle was not built from this checkpoint. Its calibration, if any, is no part of that."""
    built = manifest.get("inputs")
    recorded = {name: entry.get("sha256") for name, entry in built.items()} if isinstance(built, dict) else {}
    recorded.pop(CALIBRATION, None)
    if options.model_config is not None:
        inputs = {**inputs, MODEL_CONFIG: sha256(options.model_config)}
    other = sorted(name for name in {**recorded, **inputs} if recorded.get(name) != inputs.get(name))
    weights = [adapter.weight for adapter in options.lora]
    merged = [adapter.get("weight") for adapter in manifest.get("adapters", ())]
    if not other and merged == weights:
        return
    if not other:
        shown = [" ".join(f"{weight!a:.20}" for weight in each) or "none" for each in (merged, weights)]
        reason = f"the bundle has adapters of weight {shown[0]}, --lora gives {shown[1]}"
    elif other[0] not in inputs:
        reason = f"the bundle was also built from {other[0]!a:.60}"
    elif other[0] not in recorded:
        reason = f"the bundle was built without {other[0]}"
    else:
        reason = f"its {other[0]} differs from the one in the manifest"
    raise BadInput(
        f"{options.bundle} was not built from {options.input_path}: {reason}\n"
        "Give the checkpoint that it was built from, with the --lora and --model_config of the build, "
        "or write to a file: --output_path."
    )


def lines(path: Path, logits: ReferenceLogits) -> Iterator[str]:
    """The result in lines for a console."""
    windows, length = logits.tokens.shape
    count = "1 window" if windows == 1 else f"{windows} windows"
    yield f"{path}: {count} of {length} tokens, {path.stat().st_size:,} bytes"
    if not logits.exact:
        kept = logits.ids.shape[2]
        stored = (
            "most likely token of each position is" if kept == 1 else f"{kept} most likely tokens of each position are"
        )
        yield f"KL divergences will be lower bounds: the {stored} stored"
    yield from logits.about.get("remarks", ())
    yield f"greedy answers: {len(logits.continuations)} of {logits.continuations.shape[1]} tokens"
