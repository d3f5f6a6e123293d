"""Quantises the head to 8 bits for its inputs in the quantised model, some of its rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from axc.calibration.file import TYPES, Calibrated
from axc.calibration.linears import SMALLEST_BLOCK, Matrix, energies, pieces
from axc.calibration.streamed import Streamed
from axc.checkpoints import EMBEDDING, HEAD, Checkpoint
from axc.quantizer import gptq
from axc.quantizer.kept import DTYPES, keep
from axc.weights import Source, float32_blocks
from axc.weights.sources import Stored
from axrun.errors import BadInput

WEIGHT_TYPE, BLOCK = "s8", 64
ROWS = 4096  # quantised at a time

Tensor = Any  # torch.Tensor


def find(sources: Mapping[str, Source], streamed: Streamed) -> Matrix | None:
    """The head; None if it is not made of a tensor's rows, or no block size divides its columns."""
    name = HEAD if HEAD in sources else EMBEDDING
    source, made = sources[name], pieces(sources[name])
    width = streamed.model.get_output_embeddings().weight.shape[1]
    found = Matrix(name, source, made or [], len(streamed.layers), WEIGHT_TYPE, BLOCK)
    while source.shape[1] % found.block:
        found = replace(found, block=found.block // 2)
    plain = made is not None and all(piece.columns is None for piece in made) and source.shape[1] == width
    return found if plain and found.block >= SMALLEST_BLOCK else None


def is_kept(head: Matrix, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has quantised it already, and the compiler writes those levels."""
    stored = [checkpoint.tensors[name] for name in head.source.reads]
    return isinstance(head.source, Stored) and any(keep(weight_type, stored[0]) for weight_type in DTYPES)


def quantise(streamed: Streamed, head: Matrix, given: Tensor) -> dict[str, tuple[Any, Any, Calibrated]]:
    """Levels and scales of the head. `given` are the outputs of the last quantised layer.

    Drift is not corrected: on SmolLM2-135M that raised the divergence from 0.0447 to 0.0473.
    """
    columns = head.source.shape[1]
    hessian = torch.zeros(columns, columns)
    with streamed.before_head() as before:
        for hidden in given:
            x = before(hidden)
            hessian.addmm_(x.T, x)
    try:
        inputs = gptq.Inputs.of(hessian)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{head.name} cannot be calibrated: {error}\nUse --quantizer rtn.") from None
    rows = head.source.shape[0]
    levels = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // head.block), np.float16)
    noise, signal = np.zeros(2), np.zeros(2)
    for start, block in float32_blocks(head.name, head.source, streamed.checkpoint, ROWS):
        own, stop = torch.from_numpy(block), start + len(block)
        part, scale = inputs.quantize(own, TYPES[head.weight_type], head.block)
        levels[start:stop], scales[start:stop] = gptq.as_arrays(part, scale)
        difference = gptq.dequantize(part, scale) - own
        noise += energies(difference, hessian)
        signal += energies(own, hessian)
    return {head.name: (levels, scales, head.calibrated(noise, signal))}
