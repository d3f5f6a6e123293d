"""Chooses the matrices with 8 bits for a given average: those whose 4-bit error costs most at the output, per weight.

The cost is the Kullback-Leibler divergence caused by the error, to second order: half the expectation of (g . dW)^2,
with g the gradient of the log-likelihood of tokens drawn from the model's own distribution (its Fisher information).
One forward and one backward pass over short sequences measure it for all matrices, with one layer in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from axc.calibration.linears import Matrix
from axc.calibration.streamed import Call, Streamed, run
from axc.checkpoints import EMBEDDING, HEAD
from axc.quantizer import gptq
from axc.weights import float32

SEQUENCES, LENGTH = 48, 64  # what the gradients are taken over
EIGHT_BIT_BLOCK = 64
Tensor = Any  # torch.Tensor
Progress = Callable[[int, int, str], None]


def choose(
    streamed: Streamed, matrices: list[Matrix], ids: Tensor, target: float, progress: Progress = lambda *_: None
) -> list[Matrix]:
    """The matrices, the most sensitive ones in s8, with at most `target` bits per weight on average."""
    costs = effects(streamed, matrices, ids, progress)
    size = {matrix.name: matrix.source.shape[0] * matrix.source.shape[1] for matrix in matrices}
    total = sum(size.values())
    wide = {matrix.name: _in_eight_bits(matrix) for matrix in matrices}
    used = sum(matrix.bits * size[matrix.name] for matrix in matrices)
    chosen = set()
    for matrix in sorted(matrices, key=lambda m: (-costs[m.name] / size[m.name], m.name)):
        more = (wide[matrix.name].bits - matrix.bits) * size[matrix.name]
        if used + more <= target * total:
            chosen.add(matrix.name)
            used += more
    return [wide[matrix.name] if matrix.name in chosen else matrix for matrix in matrices]


def _in_eight_bits(matrix: Matrix) -> Matrix:
    block = EIGHT_BIT_BLOCK
    while matrix.source.shape[1] % block:
        block //= 2
    return replace(matrix, weight_type="s8", block=block)


def effects(
    streamed: Streamed, matrices: list[Matrix], ids: Tensor, progress: Progress = lambda *_: None
) -> dict[str, float]:
    """By name: the divergence per token, to second order, if only this matrix is rounded to 4 bits."""
    length = min(LENGTH, ids.shape[1])
    sequences = ids[:, : ids.shape[1] // length * length].reshape(-1, length)
    step = max(len(sequences) // SEQUENCES, 1)
    sequences = sequences[::step][:SEQUENCES]
    total = 2 * len(streamed.layers)
    hidden, calls = streamed.enter(sequences)
    inputs: list[list[Tensor]] = []
    with torch.no_grad():
        for index in range(len(streamed.layers)):
            progress(index, total, f"effect of layer {index + 1} of {len(streamed.layers)}")
            inputs.append(hidden)
            layer = streamed.load(index)
            hidden = [run(layer, calls[index], x) for x in hidden]
            streamed.release(layer)
    gradients = _of_output(streamed, hidden)
    costs: dict[str, float] = {}
    for index in reversed(range(len(streamed.layers))):
        progress(total - index - 1, total, f"effect of layer {index + 1} of {len(streamed.layers)}")
        own = [matrix for matrix in matrices if matrix.layer == index]
        layer = streamed.load(index)
        costs |= _of_layer(streamed, index, layer, own, inputs.pop(), gradients, calls[index])
        streamed.release(layer)
    tokens = sequences.numel()
    return {name: cost / tokens for name, cost in costs.items()}


def _of_output(streamed: Streamed, hidden: list[Tensor]) -> list[Tensor]:
    """Gradients of the log-likelihood of a token drawn at each position, with respect to the last layer's outputs."""
    head = streamed.model.get_output_embeddings()
    drawn = torch.Generator().manual_seed(0)
    gradients = []
    with streamed.behind_layers() as behind:
        table = HEAD if HEAD in streamed.tensors else EMBEDDING
        streamed.set(head, "weight", streamed.tensor(table, tuple(head.weight.shape)))
        for rows in hidden:
            given = rows.detach().requires_grad_(True)
            logits = behind(given)[0]
            tokens = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
            torch.nn.functional.cross_entropy(logits, tokens, reduction="sum").backward()
            gradients.append(given.grad)
    return gradients


def _of_layer(
    streamed: Streamed,
    index: int,
    layer: Any,
    matrices: list[Matrix],
    inputs: list[Tensor],
    gradients: list[Tensor],
    call: Call,
) -> dict[str, float]:
    """Costs of a layer's matrices. `gradients`, of the layer's outputs, become those of its inputs."""
    prefix = f"{streamed.prefix}.{index}."
    errors = {}
    for matrix in matrices:
        own = torch.from_numpy(float32(matrix.name, matrix.source, streamed.checkpoint))
        errors[matrix.name] = _rounded(own, matrix.block) - own
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, arguments: tuple[Any, ...], out: Tensor) -> None:
        out.retain_grad()
        caught[name] = (arguments[0].detach(), out)

    targets = {piece.name.removeprefix(prefix).removesuffix(".weight") for m in matrices for piece in m.pieces}
    hooks = [
        layer.get_submodule(name).register_forward_hook(lambda _, given, out, name=name: keep(name, given, out))
        for name in sorted(targets)
    ]
    costs = dict.fromkeys(errors, 0.0)
    try:
        for at, rows in enumerate(inputs):
            given = rows.detach().requires_grad_(True)
            run(layer, call, given).backward(gradients[at])
            gradients[at] = given.grad
            for matrix in matrices:
                costs[matrix.name] += 0.5 * _product(matrix, prefix, errors[matrix.name], caught) ** 2
            caught.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def _product(matrix: Matrix, prefix: str, error: Tensor, caught: dict[str, tuple[Tensor, Tensor]]) -> float:
    """g . dW over a sequence."""
    whole, start = 0.0, 0
    for piece in matrix.pieces:
        x, out = caught[piece.name.removeprefix(prefix).removesuffix(".weight")]
        x = x if piece.columns is None else x[..., torch.from_numpy(piece.columns)]
        own = error[start : start + len(piece.rows)] / piece.factor
        start += len(piece.rows)
        gradient = out.grad[..., torch.from_numpy(piece.rows)]
        whole += float((gradient * (x @ own.T)).sum(dtype=torch.float64))
    return whole


def _rounded(weights: Tensor, block: int) -> Tensor:
    scales = gptq.search_scales(weights, torch.ones(weights.shape[1]), "INT4", block)
    groups = weights.view(*scales.shape, -1)
    levels = torch.clamp(torch.round(groups / scales[..., None]), -8, 7)
    return gptq.dequantize(levels.view(weights.shape), scales)
