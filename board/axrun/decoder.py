"""Decoder layers with their KV cache: hidden states in, hidden states out, in chunks that fit the shape groups."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput, CheckFailed, NotFinite
from axrun.format.axmodel import TensorInfo
from axrun.format.dtypes import from_float32, to_float32
from axrun.kv_cache import KVCache, fill_mask, hide_before_window, visible_and_blocked
from axrun.session import Binding, Session, SessionGroup

Array = NDArray[Any]

# Granularity of shapes on a flexible engine: bounds both the padding and the number of distinct shapes.
TOKENS_STEP = 8
HISTORY_STEP = 64

TENSORS = {"indices", "input", "mask", "K_cache_out", "V_cache_out", "output"}
PLAIN = {"input", "output"}  # of a layer that keeps nothing between tokens


@dataclass(frozen=True)
class Chunk:
    """`count` tokens from `position` on, to be run in a shape group."""

    group: int
    position: int
    count: int


@dataclass(frozen=True)
class Step:
    """All layers bound for one shape. `output` is that of the last layer; the arrays are views of shared buffers.

    `masks`: one mask for each attention window.
    """

    bindings: Sequence[Binding]
    indices: Array
    masks: dict[int, Array]
    input: Array
    output: Array
    keys: Array
    values: Array


def chunks(groups: Sequence[SessionGroup], position: int, count: int, flexible: bool = False) -> Iterator[Chunk]:
    """Splits `count` tokens from `position` on into chunks.

    A chunk uses the prefill group with the smallest history that holds the cached tokens before it. A single token, and
    tokens beyond the history of all prefill groups, use a decode group: token by token, or on a flexible engine with as
    many tokens per run as in prefill.
    """
    most = max(group.tokens for group in groups)
    while count:
        fitting = [group for group in groups if group.history >= position]
        prefill = [group for group in fitting if group.tokens > 1 and count > 1]
        group = min(prefill or [group for group in fitting if group.tokens == 1], key=lambda group: group.history)
        taken = min(most if flexible else group.tokens, count)
        yield Chunk(group.index, position, taken)
        position, count = position + taken, count - taken


def expect_room(count: int, context: int) -> None:
    """Raises BadInput if `count` tokens do not fit the KV cache."""
    if count > context:
        raise BadInput(
            f"{count} tokens do not fit the context of {context} (kv_cache_len)\n"
            "Shorten the prompt, or build the bundle with a larger --kv_cache_len."
        )


class Decoder:
    """The layers of a model in order, or a single one. `dtype` is the hidden_state_type as an ONNX type name."""

    def __init__(self, sessions: Sequence[Session], cache: KVCache | None = None) -> None:
        """`cache` None: one of its own. Raises BadInput if the layers do not fit together."""
        self.sessions = sessions
        if cache is not None:
            self.cache = cache
        first = next((index for index, session in enumerate(sessions) if _tensors(session).keys() != PLAIN), 0)
        self.groups = sessions[first].groups
        infos = _tensors(sessions[first])
        if not infos.keys() >= TENSORS and infos.keys() != PLAIN:
            raise BadInput(
                f"layer {first} has no {', '.join(sorted(TENSORS - infos.keys()))}: it is not the axmodel of a layer"
            )
        self.caches = [_tensors(session).keys() != PLAIN for session in sessions]
        for index, session in enumerate(sessions):
            if session.groups != (self.groups if self.caches[index] else _plain(self.groups)):
                raise BadInput(
                    f"layer {index} has other shape groups or tensors than layer {first}; build the bundle again"
                )
        decode = sorted((group for group in self.groups if group.tokens == 1), key=lambda group: group.history)
        if not decode:
            raise BadInput("the layers have no decode group (one of 1 token); build the bundle again")
        self.flexible = all(session.flexible for session in sessions)
        self.exact = all(session.exact for session in sessions)
        self.stacks = all(session.stacks for session in sessions)
        self.context = decode[-1].history
        self._decode = decode
        self.dtype = infos["input"].dtype
        self.hidden_size = int(infos["input"].shape[2])
        self.kv_size = int(infos["K_cache_out"].shape[2]) if any(self.caches) else 0
        self.visible, self.blocked = visible_and_blocked(self.dtype)
        tokens = self.most = max(group.tokens for group in self.groups)
        history = self.history = max(group.history for group in self.groups)
        self._hidden = [self._allocate(name, 1, tokens, self.hidden_size) for name in ("input", "output")]
        self._rows = [self._allocate(name, 1, tokens, self.kv_size) for name in ("K_cache_out", "V_cache_out")]
        self._indices = self._allocate("indices", 1, tokens, dtype="UINT32")
        masks = [group.tokens * (group.tokens + group.history) for group in self.groups]
        most = tokens * (tokens + history) if self.flexible else max(masks)
        self._masks = {window: self._allocate("mask", most) for window in {session.window for session in sessions}}
        self._steps: dict[tuple[int, int, int], Step] = {}

    @functools.cached_property
    def cache(self) -> KVCache:
        """Allocated at its first use."""
        widths = [self.kv_size if caches else 0 for caches in self.caches]
        return KVCache(
            [self._allocate("K_cache", 1, self.history, width, layer=i) for i, width in enumerate(widths)],
            [self._allocate("V_cache", 1, self.history, width, layer=i) for i, width in enumerate(widths)],
        )

    def chunks(self, position: int, count: int) -> Iterator[Chunk]:
        """The chunks that run `count` tokens from `position` on."""
        if count == 1:  # fast path for decode, same result as below
            group = next(group for group in self._decode if group.history >= position)
            return iter((Chunk(group.index, position, 1),))
        return chunks(self.groups, position, count, self.flexible)

    def forward(self, hidden: NDArray[np.float32], position: int) -> NDArray[np.float32]:
        """The output of the layers, float32 [n, H], for hidden states [n, H] of tokens at `position`, position + 1, ...

        The inputs are rounded to `dtype`. Cached rows from `position` on are replaced.
        Raises BadInput if the tokens exceed the context, CheckFailed if a layer returns values that are not finite.
        """
        outputs = self.run(from_float32(hidden, self.dtype), position)
        return np.concatenate([to_float32(output, self.dtype) for _, output in outputs])

    def run(self, hidden: Array, position: int) -> Iterator[tuple[Chunk, Array]]:
        """Like `forward`, in the type `dtype`, chunk by chunk; the next chunk overwrites the output."""
        if not 0 <= position <= self.cache.length:
            raise ValueError(f"position {position} leaves a gap after the {self.cache.length} tokens in the cache")
        expect_room(position + len(hidden), self.context)
        done = 0
        for chunk in self.chunks(position, len(hidden)):
            yield chunk, self._run(chunk, hidden[done : done + chunk.count])
            done += chunk.count

    def _run(self, chunk: Chunk, hidden: Array) -> Array:
        step = self._step(chunk)
        position, count = chunk.position, chunk.count
        self.cache.prepare(position, count)
        step.input[0, :count] = hidden
        step.input[0, count:] = 0  # padding: a stale NaN would pass through the mask
        step.indices[0] = 0
        step.indices[0, :count] = np.arange(position, position + count)
        for window, mask in step.masks.items():
            fill_mask(mask, position, count, self.visible, self.blocked)
            if window:
                hide_before_window(mask, position, count, window, self.blocked)
        keys, values = step.keys[:, :count], step.values[:, :count]
        for layer, binding in enumerate(step.bindings):
            try:
                binding.run()
            except NotFinite as error:
                if error.row < count:  # otherwise padding, which is not read
                    raise self.overflow(error, layer, position + error.row) from None
            if self.caches[layer]:
                self.cache.write(layer, position, keys, values)
        self.cache.length = position + count
        return step.output[0, :count]

    def overflow(self, error: NotFinite, layer: int, token: int) -> CheckFailed:
        """The error for a value of a layer that is not finite, at the position `token`."""
        seen = (
            f"{error.part or f'layer {layer}'} returned a value that is not finite in {error.tensor}, at token {token}"
        )
        if self.dtype == "FLOAT16":
            return CheckFailed(
                f"{seen}: it exceeds 65504, the largest float16 value\nBuild with --hidden_state_type bf16 or fp32."
            )
        return CheckFailed(
            f"{seen}: it overflows or its files are damaged\nRun `axrun run --verify`, or build the bundle again."
        )

    def shape(self, chunk: Chunk) -> tuple[int, int]:
        """The shape (tokens, history) of a chunk: that of its group, or with less padding on a flexible engine."""
        group = self.groups[chunk.group]
        if not self.flexible:
            return group.tokens, group.history
        tokens = 1 if chunk.count == 1 else min(self.most, _ceil(chunk.count, TOKENS_STEP))
        return tokens, min(group.history, _ceil(max(chunk.position, 1), HISTORY_STEP))

    def _step(self, chunk: Chunk) -> Step:
        key = (chunk.group, *self.shape(chunk))
        if key not in self._steps:
            self._steps[key] = self._bind(*key)
        return self._steps[key]

    def _bind(self, group: int, tokens: int, history: int) -> Step:
        indices = self._indices[:, :tokens]
        size = tokens * (history + tokens)
        masks = {window: mask[:size].reshape(1, tokens, history + tokens) for window, mask in self._masks.items()}
        hidden = [array[:, :tokens] for array in self._hidden]
        keys, values = (array[:, :tokens] for array in self._rows)
        bindings = []
        for layer, session in enumerate(self.sessions):
            arrays = {
                "indices": indices,
                "input": hidden[layer % 2],
                "mask": masks[session.window],
                "K_cache_out": keys,
                "V_cache_out": values,
                "output": hidden[(layer + 1) % 2],
            }
            if not self.caches[layer]:
                arrays = {name: array for name, array in arrays.items() if name in PLAIN}
            elif history:
                arrays["K_cache"] = self.cache.keys[layer][:, :history]
                arrays["V_cache"] = self.cache.values[layer][:, :history]
            bindings.append(session.bind(group, arrays))
        return Step(bindings, indices, masks, hidden[0], hidden[len(bindings) % 2], keys, values)

    def _allocate(self, name: str, *shape: int, dtype: str = "", layer: int = 0) -> Array:
        return self.sessions[layer].allocate(TensorInfo(name, dtype or self.dtype, shape))


def _tensors(session: Session) -> dict[str, TensorInfo]:
    return {info.name: info for group in session.groups for info in group.inputs + group.outputs}


def _plain(groups: Sequence[SessionGroup]) -> tuple[SessionGroup, ...]:
    """The groups of a layer that keeps nothing, beside those of layers that do."""
    return tuple(
        replace(
            group,
            inputs=tuple(info for info in group.inputs if info.name in PLAIN),
            outputs=tuple(info for info in group.outputs if info.name in PLAIN),
        )
        for group in groups
    )


def _ceil(number: int, step: int) -> int:
    return -(-number // step) * step
