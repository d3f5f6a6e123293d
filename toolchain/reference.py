"""The independent reference: transformers in float32, one decoder layer in memory at a time.

It reads the checkpoint as it is, never our quantised copy of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from board.errors import BadInput
from toolchain.budget import available_memory, megabytes
from toolchain.checkpoint import EMBEDDING, Checkpoint, widen
from toolchain.config import ModelConfig

try:
    import torch
    import transformers
except ImportError:
    raise BadInput(
        "the float32 reference needs torch and transformers, which are not installed\n"
        "Run `make setup`, or build with --check_level 0 (load and run) or -1 (no check)."
    ) from None

Floats = NDArray[np.float32]


class Reference:
    """Float32 hidden states and logits of a checkpoint, by transformers' own modules."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, model_config: Path | None = None) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.checkpoint, self.config = checkpoint, config
        self.hf_config = transformers.AutoConfig.from_pretrained(
            model_config or checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        self.hf_config._attn_implementation = "eager"
        auto: Any = transformers.AutoModelForCausalLM
        with torch.device("meta"):
            self.skeleton = auto.from_config(self.hf_config, dtype=torch.float32)
        self.rotary = type(self.skeleton.model.rotary_emb)(config=self.hf_config)

    def embed(self, ids: NDArray[np.int64]) -> Floats:
        """Rows of the embedding table: [n, hidden]."""
        return np.concatenate([_float32(self.checkpoint, EMBEDDING, int(token), int(token) + 1) for token in ids])

    @torch.inference_mode()
    def layers(self, ids: NDArray[np.int64]) -> Iterator[tuple[int, Floats, Floats]]:
        """(index, input, output) of every decoder layer over a whole sequence; both [n, hidden]."""
        hidden = torch.from_numpy(self.embed(ids))[None]
        for index, layer in self._layers(len(ids)):
            out = layer(hidden)
            yield index, hidden[0].numpy(), out[0].numpy()
            hidden = out

    @torch.inference_mode()
    def hidden(self, ids: NDArray[np.int64], progress: Callable[[str], None] = lambda line: None) -> Floats:
        """The last decoder layer's output [n, length, hidden] for sequences [n, length].

        Each layer is read once, whatever their number. `progress(line)` is called after each.
        """
        hidden = torch.from_numpy(self.embed(ids.reshape(-1))).view(*ids.shape, -1)
        for index, layer in self._layers(ids.shape[1]):
            for sequence in hidden:
                sequence.copy_(layer(sequence[None])[0])
            progress(f"[{index + 1}/{self.config.num_hidden_layers}] layers")
        return np.asarray(hidden.numpy())

    def _layers(self, length: int) -> Iterator[tuple[int, Callable[[Any], Any]]]:
        """Every decoder layer as a function of hidden states [1, length, hidden]."""
        positions = torch.arange(length)[None]
        rotary = self.rotary(torch.zeros(1), positions)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        for index in range(self.config.num_hidden_layers):
            layer = self._materialise(self.skeleton.model.layers[index], f"model.layers.{index}.")

            def run(hidden: Any, layer: Any = layer) -> Any:
                out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
                return out[0] if isinstance(out, tuple) else out

            yield index, run

    @torch.inference_mode()
    def logits(self, hidden: Floats) -> Floats:
        """Final norm and lm_head of [n, hidden]: [n, vocab]."""
        norm = self._materialise(self.skeleton.model.norm, "model.norm.")
        name = EMBEDDING if self.config.tie_word_embeddings else "lm_head.weight"
        normed = norm(torch.from_numpy(hidden))
        columns = [
            normed @ torch.from_numpy(widen(block, self.checkpoint.tensors[name].dtype)).T
            for _, block in self.checkpoint.blocks(name)
        ]
        return np.asarray(torch.cat(columns, dim=1).numpy())

    @torch.inference_mode()
    def generate(self, ids: NDArray[np.int64], tokens: int, stop: frozenset[int]) -> list[int]:
        """Greedy continuation by the whole model in float32, without the token that stops it.

        Raises BadInput when memory cannot hold the model.
        """
        out: list[int] = []
        cache, given = None, torch.from_numpy(ids)[None]
        while len(out) < tokens:
            step = self._whole(given, past_key_values=cache, use_cache=True)
            cache, token = step.past_key_values, int(step.logits[0, -1].argmax())
            if token in stop:
                break
            out.append(token)
            given = torch.tensor([[token]])
        return out

    @functools.cached_property
    def _whole(self) -> Any:
        need = 4 * sum(int(np.prod(stored.shape)) for stored in self.checkpoint.tensors.values())
        available = available_memory()
        if available is not None and available < need:
            raise BadInput(
                f"to generate, the float32 reference is held in memory: {megabytes(need)}, {megabytes(available)} are "
                "available\nGo without: llm_build --check_level 1, reference --greedy_tokens 0."
            )
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_pretrained(
            self.checkpoint.path,
            config=self.hf_config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        ).eval()

    def _materialise(self, module: Any, prefix: str) -> Any:
        """A module of the skeleton, with the checkpoint's weights in float32."""
        module = copy.deepcopy(module).to_empty(device="cpu")
        state = {name: torch.from_numpy(_float32(self.checkpoint, prefix + name)) for name in module.state_dict()}
        module.load_state_dict(state, strict=True)
        return module.eval()


def _float32(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Floats:
    stop = checkpoint.tensors[name].shape[0] if stop is None else stop
    return widen(checkpoint.rows(name, start, stop), checkpoint.tensors[name].dtype)
