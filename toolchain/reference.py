"""The independent reference: transformers in float32, one decoder layer in memory at a time.

It reads the checkpoint as it is, never our quantised copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from board.errors import BadInput
from toolchain.budget import available_memory, megabytes
from toolchain.checkpoint import Checkpoint, widen
from toolchain.config import ModelConfig
from toolchain.families.decoder import EMBEDDING

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
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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
        positions = torch.arange(len(ids))[None]
        rotary = self.rotary(hidden, positions)
        mask = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)[None, None]
        for index in range(self.config.num_hidden_layers):
            layer = self._materialise(self.skeleton.model.layers[index], f"model.layers.{index}.")
            out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            out = out[0] if isinstance(out, tuple) else out
            yield index, hidden[0].numpy(), out[0].numpy()
            hidden = out

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
        need = 4 * sum(int(np.prod(stored.shape)) for stored in self.checkpoint.tensors.values())
        available = available_memory()
        if available is not None and available < need:
            raise BadInput(
                f"check level 2 holds the float32 reference in memory: {megabytes(need)}, {megabytes(available)} are "
                "available\nUse --check_level 1, which holds one layer at a time."
            )
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(
            self.checkpoint.path,
            config=self.hf_config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        ).eval()
        out: list[int] = []
        cache, given = None, torch.from_numpy(ids)[None]
        while len(out) < tokens:
            step = model(given, past_key_values=cache, use_cache=True)
            cache, token = step.past_key_values, int(step.logits[0, -1].argmax())
            if token in stop:
                break
            out.append(token)
            given = torch.tensor([[token]])
        return out

    def _materialise(self, module: Any, prefix: str) -> Any:
        """A module of the skeleton, with the checkpoint's weights in float32."""
        module = copy.deepcopy(module).to_empty(device="cpu")
        state = {name: torch.from_numpy(_float32(self.checkpoint, prefix + name)) for name in module.state_dict()}
        module.load_state_dict(state, strict=True)
        return module.eval()


def _float32(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Floats:
    stop = checkpoint.tensors[name].shape[0] if stop is None else stop
    return widen(checkpoint.rows(name, start, stop), checkpoint.tensors[name].dtype)
