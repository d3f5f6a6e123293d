"""transformers' model of a checkpoint with one decoder layer in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from axc.calibration.linears import Piece, pieces
from axc.calibration.twin import Twin
from axc.checkpoints import Checkpoint, widen
from axc.checkpoints.multimodal import text_name
from axc.families.family import ModelConfig
from axc.families.multimodal import is_multimodal
from axc.reference import auto_class
from axc.weights import Source, float32
from axc.weights.sources import Stored
from axrun.errors import BadInput

Tensor = Any  # torch.Tensor
INSTEAD = "quantise without calibration, by --quantizer rtn."


class _Reached(Exception):
    """Ends a forward pass whose remaining part is not needed."""


@dataclass(frozen=True)
class Call:
    """Arguments of a layer besides the hidden states."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Streamed:
    """`layers` have no weights until `load`; the embedding only holds the rows of the ids in use.

    `tensors` are those of transformers' model, by its names. It is the checkpoint's model, or its twin.
    """

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig, model_config: Path | None = None) -> None:
        """`model_config` replaces the checkpoint's config.json.

        Raises BadInput where transformers has no such model, or names its weights otherwise.
        """
        self.checkpoint = checkpoint
        self.twin = Twin.find(model)
        stored: dict[str, Source] = {name: Stored(name, found.shape) for name, found in checkpoint.tensors.items()}
        self.tensors = self.twin.tensors if self.twin else stored
        transformers.logging.set_verbosity_error()
        try:
            auto: Any = transformers.AutoConfig
            if self.twin:
                config = auto.for_model(**self.twin.config)
            else:
                folder = model_config or checkpoint.folder
                config = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config._attn_implementation = "eager"
            with _no_weights():
                self.model: Any = (
                    auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
                )
        except Exception as error:  # its loaders name no limit to what they raise
            words = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(
                f"{checkpoint.path} cannot be calibrated: transformers {transformers.__version__} has no such model: "
                f"{words:.160}\nInstead, {INSTEAD}"
            ) from None
        length = config.get_text_config().num_hidden_layers
        inside = {id(module) for module in self.model.get_decoder().modules()}
        named = [(name, module) for name, module in self.model.named_modules() if id(module) in inside]
        lists = [(name, m) for name, m in named if isinstance(m, nn.ModuleList) and len(m) == length]
        if not lists:
            raise BadInput(
                f"{checkpoint.path} cannot be calibrated: no list of {length} layers is found\nInstead, {INSTEAD}"
            )
        prefix, self.layers = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
        self.multimodal = is_multimodal(config.to_dict())
        self.prefix = str(self.stored(f"{prefix}.")).removesuffix(".")

    def stored(self, name: str) -> str | None:
        """The name in `tensors` of a tensor of transformers' model; None if it is not of the text model."""
        return text_name(name) if self.multimodal else name

    def load(self, index: int) -> Any:
        """Layer `index` with the checkpoint's weights in float32."""
        layer = self.layers[index]
        self.fill(layer, f"{self.prefix}.{index}.")
        return layer

    def fill(self, module: Any, prefix: str) -> None:
        """The weights of a module whose name begins with `prefix`. Raises BadInput."""
        for name, parameter in list(module.named_parameters()):
            self.set(module, name, self.tensor(f"{prefix}{name}", tuple(parameter.shape)))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of transformers' model in float32. Raises BadInput."""
        source = self.tensors.get(name)
        if source is None or source.shape != shape:
            raise BadInput(
                f"{self.checkpoint.path} cannot be calibrated: transformers' model has a {name} of shape "
                f"{list(shape)}, the checkpoint {'none' if source is None else list(source.shape)}\nInstead, {INSTEAD}"
            )
        return torch.from_numpy(float32(name, source, self.checkpoint))

    def pieces(self, name: str, source: Source) -> list[Piece] | None:
        """A matrix of an axmodel as rows of tensors of transformers' model; None where it is made otherwise."""
        return pieces(self.twin.weights[name] if self.twin else source)

    def release(self, module: Any) -> None:
        """Frees a module's weights."""
        for name, parameter in list(module.named_parameters()):
            self.set(module, name, parameter.to("meta"))

    @staticmethod
    def set(module: Any, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    @contextlib.contextmanager
    def behind_layers(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Calls of the model with the last layer's outputs [1, n, hidden]; they give logits. Raises BadInput.

        The final norm is in memory; the weight of the head is the caller's to set.
        """
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for name, parameter in list(self.model.named_parameters()):
            stored = self.stored(name)
            outside = stored is not None and not stored.startswith(f"{self.prefix}.")
            if outside and parameter is not embedding.weight and parameter is not head.weight:
                self.set(self.model, name, self.tensor(str(stored), tuple(parameter.shape)))
        given: list[Tensor] = []

        def behind(hidden: Tensor) -> Tensor:
            given[:] = [hidden]
            return self.model(inputs_embeds=hidden, use_cache=False).logits

        try:
            for layer in self.layers:
                layer.forward = lambda *_, **__: given[0]
            yield behind
        finally:
            for layer in self.layers:
                del layer.forward
            self.release(head)
            if embedding.weight is not head.weight and not embedding.weight.is_meta:
                self.release(embedding)

    @contextlib.contextmanager
    def before_head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What the head gets [n, hidden] for the last layer's outputs [1, n, hidden]. Raises BadInput."""
        caught: list[Tensor] = []

        def catch(_: Any, arguments: tuple[Any, ...]) -> None:
            caught[:] = arguments[:1]
            raise _Reached

        def before(hidden: Tensor) -> Tensor:
            with contextlib.suppress(_Reached):
                behind(hidden)
            return caught[0].flatten(0, -2)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            with self.behind_layers() as behind:
                yield before
        finally:
            hook.remove()

    @torch.no_grad()
    def enter(self, windows: Tensor) -> tuple[Tensor, list[Call]]:
        """The first layer's inputs [count, 1, n, hidden] for windows [count, n] of ids, and how the model calls the
        layers.
        """
        used, compact = torch.unique(windows, return_inverse=True)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        table = self.tensors[str(self.stored(f"{name}.weight"))]
        dtype = table.dtype(self.checkpoint)
        rows = [widen(table.rows(self.checkpoint, row, row + 1), dtype) for row in used.tolist()]
        embedding._parameters["weight"] = nn.Parameter(torch.from_numpy(np.concatenate(rows)), requires_grad=False)
        entered = torch.empty(0)
        count = 0
        calls: list[Call] = []

        def first(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            nonlocal entered, count
            if not count:
                entered = hidden.new_empty(len(windows), *hidden.shape)
            entered[count] = hidden
            count += 1
            if count > 1:
                raise _Reached
            return then(hidden, *arguments, **named)

        def then(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            calls.append(Call(arguments, {**named, "past_key_values": None, "use_cache": False}))
            if len(calls) == len(self.layers):
                raise _Reached
            return hidden

        try:
            for index, layer in enumerate(self.layers):
                layer.forward = then if index else first
            for ids in compact:
                with contextlib.suppress(_Reached):
                    self.model(ids[None], use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
            self.release(embedding)
        return entered, calls


def run(layer: Any, call: Call, hidden: Tensor) -> Tensor:
    """A layer's outputs [1, n, hidden]."""
    out = layer(hidden, *call.arguments, **call.named)
    return out[0] if isinstance(out, tuple) else out


@contextlib.contextmanager
def _no_weights() -> Iterator[None]:
    """Modules created inside have parameters without memory; their buffers are as usual."""
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
