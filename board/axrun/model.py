"""A bundle in memory: token ids in, logits out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from axrun.decoder import Chunk, Decoder
from axrun.errors import BadInput, NotFinite
from axrun.format import axmodel
from axrun.format.axmodel import TensorInfo
from axrun.format.bundle import Bundle
from axrun.format.dtypes import FLOATS, bf16_to_f32, from_float32, to_float32
from axrun.kv_cache import KVCache
from axrun.sampling.draw import overflow
from axrun.session import Binding, Session, open_session

Array = NDArray[Any]
Logits = NDArray[np.float32]

POST_ROWS = 32  # rows per run of the post model on a flexible engine


class Embedding:
    """The embedding table [vocab, hidden] of a bundle, memory-mapped from its bfloat16 file."""

    def __init__(self, path: str | os.PathLike[str], vocab_size: int, hidden_size: int, dtype: str) -> None:
        """`dtype` is the type of the returned rows. Raises BadInput if the file has another size."""
        expected = vocab_size * hidden_size * 2
        seen = os.path.getsize(path)
        if seen != expected:
            raise BadInput(
                f"{path} has {seen} bytes, expected {expected} ({vocab_size} x {hidden_size} bfloat16)\n"
                "Build or copy the bundle again."
            )
        self._table = np.memmap(path, "<u2", "r", shape=(vocab_size, hidden_size))
        self._dtype = dtype

    def __call__(self, ids: Sequence[int]) -> Array:
        """Hidden states [n, hidden] of token ids. Raises BadInput for an id outside the table."""
        wrong = [token for token in ids if not 0 <= token < len(self._table)]
        if wrong:
            raise BadInput(
                f"token id {wrong[0]} is outside the vocabulary of {len(self._table)}; do tokenizer and model match?"
            )
        rows: Array = self._table[np.asarray(ids, np.int64)]
        return rows if self._dtype == "BFLOAT16" else from_float32(bf16_to_f32(rows), self._dtype)


class Post:
    """The post model: final norm and lm_head."""

    def __init__(self, session: Session) -> None:
        """Raises BadInput if the session is not that of a post model."""
        self.session = session
        group = session.groups[0]
        infos = {info.name: info for info in group.inputs + group.outputs}
        if not infos.keys() >= {"input", "output"}:
            raise BadInput(f"the post model has {', '.join(sorted(infos))}; expected input and output")
        self._input, self._output = infos["input"], infos.get("logits", infos["output"])
        self.hidden_size, self.vocab_size = int(self._input.shape[2]), int(self._output.shape[2])
        self.dtype = self._input.dtype
        self._rows = POST_ROWS if session.flexible else 1
        self._postnorm = infos.get("postnorm")
        self._memory: dict[tuple[str, int], tuple[Array, Array]] = {}
        self._bound: dict[tuple[str, int], tuple[Binding, Array, Array]] = {}

    def __call__(self, hidden: Array) -> Logits:
        """float32 logits [n, vocab] of hidden states [n, H]; the next call may overwrite them.

        Raises CheckFailed if one is not finite.
        """
        return self._rows_of(hidden, self._output)

    @property
    def normalises(self) -> bool:
        """Whether the post model returns the normalised hidden states (--ret_postnorm)."""
        return self._postnorm is not None

    def normalised(self, hidden: Array) -> Logits:
        """float32 output [n, H] of the final norm for hidden states [n, H]; the next call may overwrite it.

        Only for a post model that `normalises`. Raises CheckFailed if a value is not finite.
        """
        assert self._postnorm is not None
        return self._rows_of(hidden, self._postnorm)

    def _rows_of(self, hidden: Array, output: TensorInfo) -> Logits:
        if len(hidden) > self._rows:
            cuts = range(self._rows, len(hidden), self._rows)
            return np.concatenate([self._rows_of(rows, output).copy() for rows in np.split(hidden, cuts)])
        binding, source, target = self._binding(len(hidden), output)
        source[0] = hidden
        try:
            binding.run()
        except NotFinite as error:
            wrong = target[0, error.row]
            values = to_float32(wrong, output.dtype)
            raise overflow(values[~np.isfinite(values)][0]) from None
        found: Logits = target[0] if output.dtype == "FLOAT" else to_float32(target[0], output.dtype)
        return found

    def _binding(self, rows: int, output: TensorInfo) -> tuple[Binding, Array, Array]:
        key = output.name, rows
        if key not in self._bound:
            source, target = (array[:, :rows] for array in self._buffers(1 if rows == 1 else self._rows, output))
            binding = self.session.bind(0, {self._input.name: source, output.name: target})
            self._bound[key] = binding, source, target
        return self._bound[key]

    def _buffers(self, rows: int, output: TensorInfo) -> tuple[Array, Array]:
        key = output.name, rows
        if key not in self._memory:
            shapes = [TensorInfo(info.name, info.dtype, (1, rows, info.shape[2])) for info in (self._input, output)]
            self._memory[key] = self.session.allocate(shapes[0]), self.session.allocate(shapes[1])
        return self._memory[key]


class Model:
    """Embedding, layers and post model of a bundle, with one KV cache."""

    def __init__(self, embedding: Embedding, decoder: Decoder, post: Post) -> None:
        self.embedding, self.decoder, self.post = embedding, decoder, post

    def another(self, cache: KVCache | None = None) -> Model:
        """The same model with a separate KV cache: the given one, or one of its own."""
        return Model(self.embedding, Decoder(self.decoder.sessions, cache), self.post)

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        engine: str = "ax",
        threads: int | None = None,
        progress: Callable[[str], None] = lambda done: None,
    ) -> Model:
        """Loads every axmodel of the bundle; `progress(what)` is called after each part.

        Raises BadInput if a file cannot be loaded or does not match the manifest.
        """
        hidden_type = FLOATS[bundle.hidden_state_type]
        embedding = Embedding(bundle.embedding_path, bundle.vocab_size, bundle.hidden_size, hidden_type)
        progress("embed_selector init ok")
        sessions = []
        for index in range(bundle.layers):
            _expect(bundle.layer_path(index), f"layer {index}")
            sessions.append(open_session(bundle.layer_path(index), engine, threads))
            progress(f"init {index} axmodel ok")
        decoder = Decoder(sessions)
        _expect(bundle.post_path, "post")
        post = Post(open_session(bundle.post_path, engine, threads))
        progress("init post axmodel ok")
        for what, seen, expected in (
            ("hidden size", decoder.hidden_size, bundle.hidden_size),
            ("hidden size of post", post.hidden_size, bundle.hidden_size),
            ("hidden state type", decoder.dtype, hidden_type),
            ("hidden state type of post", post.dtype, hidden_type),
            ("K/V width", decoder.kv_size, bundle.kv_size),
            ("kv_cache_len", decoder.context, bundle.kv_cache_len),
            ("vocabulary", post.vocab_size, bundle.vocab_size),
        ):
            if seen != expected:
                raise BadInput(
                    f"{bundle.path}: the {what} of the axmodels is {seen}, the manifest says {expected}\n"
                    "Build or copy the bundle again."
                )
        return cls(embedding, decoder, post)

    @property
    def length(self) -> int:
        """Number of tokens in the KV cache; the position of the next one."""
        return self.decoder.cache.length

    @property
    def context(self) -> int:
        """Maximum number of tokens."""
        return self.decoder.context

    def forward(
        self, ids: Sequence[int], position: int | None = None, logits: Literal["last", "all"] = "last"
    ) -> Logits:
        """float32 logits after the last of `ids` [vocab], or after every one [n, vocab].

        The tokens get the positions from `position` on (default: the cache length), and replace what the cache holds
        there. The next call overwrites the returned array.
        Raises BadInput for no tokens or more than fit the context, CheckFailed if a layer or the logits are not
        finite.
        """
        if logits == "all":
            return np.concatenate([rows.copy() for rows in self.blocks(ids, position)])
        for _, hidden in self.hidden(ids, position):
            last = hidden[-1:]
        return self.post(last).reshape(-1)

    def blocks(self, ids: Sequence[int], position: int | None = None) -> Iterator[Logits]:
        """Logits after every token, as `forward`, a few rows [n, vocab] at a time; each overwrites the previous."""
        for _, hidden in self.hidden(ids, position):
            yield from self.logits(hidden)

    def logits(self, hidden: Array) -> Iterator[Logits]:
        """float32 logits of hidden states [n, H], a few rows [n, vocab] at a time; each overwrites the previous."""
        for start in range(0, len(hidden), POST_ROWS):
            yield self.post(hidden[start : start + POST_ROWS])

    def hidden(self, ids: Sequence[int], position: int | None = None) -> Iterator[tuple[Chunk, Array]]:
        """Hidden states [n, H] by chunk; each overwrites the previous ones. Arguments as for `forward`."""
        if not len(ids):
            raise BadInput("the prompt is empty; at least one token is needed")
        return self.decoder.run(self.embedding(ids), self.length if position is None else position)


def _expect(path: Path, part: str) -> None:
    """Raises BadInput if a file holds another part of the model."""
    model = axmodel.read(path)
    seen = f"layer {model.layer}" if model.kind == "layer" else model.kind
    if model.ours and seen != part:
        raise BadInput(f"{path} holds {seen}, expected {part}: files were swapped\nBuild or copy the bundle again.")
