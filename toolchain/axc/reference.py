"""The independent reference: transformers loads the checkpoint by its own rules and computes in float32.

None of our readers is used: AutoConfig, AutoModelForCausalLM and AutoTokenizer open the folder themselves, so errors of
our readers show up. Exception: transformers needs a GPU for most quantised weights, so `axc.quantised_reading` supplies
those. The decoder layers are found by structure, not by the tensor names in our families.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from axc import gguf_reading, lora_reading, quantised_reading
from axc.budget import available_memory, megabytes
from axc.checkpoints.gguf import SUFFIX as GGUF
from axc.checkpoints.multimodal import text_names
from axc.families.multimodal import is_multimodal
from axrun.errors import BadInput

try:
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.modeling_utils import load_state_dict
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
except ImportError:
    raise BadInput(
        "the float32 reference needs torch and transformers, which are not installed\n"
        "Run `make setup`, or build with --check_level 0 (load and run) or -1 (no check)."
    ) from None

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the files that transformers may load weights from
WIDENED = (torch.bfloat16, torch.float16)  # types that convert to float32 without loss
HEADROOM = 1 << 30  # bytes for activations and logits in addition to the weights
TOKENS = 64  # rows of the embedding table searched for a nonzero one
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class Refused(BadInput):
    """transformers cannot load or run the folder as a complete model."""


class NoReference(Refused):
    """transformers has no code for the model_type."""


@dataclass(frozen=True)
class Trace:
    """A forward pass over n tokens: `inputs` and `outputs` [n, hidden] of each decoder layer, `logits` [n, vocab].

    `embedded` are the rows of the embedding table, [n, hidden]. They are also the first layer's input, even if the
    model scales its embedding: in an axmodel, the first layer applies the scale.
    """

    embedded: Floats
    inputs: list[Floats]
    outputs: list[Floats]
    logits: Floats


class Answer(NamedTuple):
    """Greedy `tokens` [sequences, n] and the `logits` [sequences, n, vocab] they were chosen from."""

    tokens: Ids
    logits: Floats


class Reference:
    """A checkpoint as transformers loads it.

    `remarks` are notes for the user. If memory cannot hold the model in float32, the weights stay memory-mapped in
    their stored type, and each layer is converted to float32 while it runs. The results are bit-identical.
    """

    def __init__(
        self,
        path: Path,
        model_config: Path | None = None,
        model_type: str | None = None,
        available: int | None = None,
        adapters: Sequence[tuple[Path, float]] = (),
    ) -> None:
        """`model_config` replaces the folder's config.json, `model_type` a type that transformers does not know.

        `adapters` are folders of LoRA adapters to merge, each with the weight of its change. `available` is the memory
        in bytes (default: the machine's available memory). Raises Refused, and BadInput if memory does not suffice.
        """
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.path, self.remarks = path, list[str]()
        self.config = self._read_config(model_config or path, model_type)
        with _refusing(path):
            self._quantised = quantised_reading.take_from(self.config) or quantised_reading.older(path, _mapped)
        if self._quantised is not None:
            self.remarks.append(f"{path}: {quantised_reading.SAID}")
        self.config._attn_implementation = "eager"
        self.config.return_dict = True  # outputs are accessed by name, whatever config.json sets
        with _refusing(path):
            with torch.device("meta"):
                skeleton = auto_class(self.config).from_config(
                    self.config, dtype=torch.float32, trust_remote_code=False
                )
            whole_only = path.suffix == GGUF or self._quantised is not None or bool(adapters)
            self.stored = stored = self._types()
        whole = 0 if stored == {torch.float32} and not whole_only else 4 * _count(skeleton)  # float32 files are mapped
        layers = _decoder_layers(skeleton)
        largest = max(_count(layer) for layer in layers)
        widened = 4 * (_count(skeleton) - sum(_count(layer) for layer in layers) + largest)
        available = available_memory() if available is None else available
        streamed = available is not None and available < whole + HEADROOM
        streamed = streamed and not whole_only
        need = widened if streamed and len(stored) == 1 and stored <= {*WIDENED} else whole
        if available is not None and available < need + HEADROOM:
            raise BadInput(
                f"the float32 reference of {path} needs {megabytes(need + HEADROOM)} of memory, {megabytes(available)} "
                "are available\nClose other programs, or skip the comparison: llm_build --check_level 0."
            )
        self.model = self._load(min(stored, key=str) if streamed else torch.float32, skeleton)
        for folder, weight in adapters:
            with _refusing(folder):
                lora_reading.merge(self.model, folder, weight)
            self.remarks.append(f"{folder}: {lora_reading.SAID}")
            self.stored = {torch.float32}
        self._layers = _decoder_layers(self.model)
        if streamed:
            self._stream()

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @torch.no_grad()
    def set_context(self, positions: int) -> None:
        """Uses the rotary frequencies of a sequence of `positions` tokens for every sequence.

        Matters for longrope: transformers selects frequencies by the length of a sequence, a bundle by its context.
        """
        for module in self.model.modules():
            if getattr(module, "rope_type", None) == "longrope":
                found, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, torch.device("cpu"), seq_len=positions)
                for name in ("inv_freq", "original_inv_freq"):
                    getattr(module, name).copy_(found)

    @torch.no_grad()
    def trace(self, ids: Ids, cache: Any = None) -> Trace:
        """One forward pass over the tokens [n], after the rows in `cache`."""
        inputs: list[Any] = []
        outputs: list[Any] = []

        def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.append((arguments[0] if arguments else named["hidden_states"])[0].clone())

        def after(_: Any, __: Any, out: Any) -> None:
            outputs.append((out[0] if isinstance(out, tuple) else out)[0].clone())

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        hooks += [layer.register_forward_hook(after) for layer in self._layers]
        given = torch.from_numpy(np.array(ids, np.int64))[None]
        try:
            with _refusing(self.path, "run"):
                out = self.model(given, past_key_values=cache, use_cache=cache is not None)
        finally:
            for hook in hooks:
                hook.remove()
        embedded = self.model.get_input_embeddings().weight[given[0]].float()
        given_to = [embedded, *inputs[1:]]
        return Trace(
            embedded.numpy(), [x.numpy() for x in given_to], [x.numpy() for x in outputs], out.logits[0].numpy()
        )

    @torch.no_grad()
    def logits(self, ids: Ids) -> Floats:
        """[n, vocab] for the tokens [n]."""
        with _refusing(self.path, "run"):
            out = self.model(torch.from_numpy(np.array(ids, np.int64))[None], use_cache=False)
        return np.asarray(out.logits[0].numpy())

    def table(self) -> Any:
        """The embedding table, a torch tensor [vocab, hidden] in the type it is loaded in."""
        model: Any = self.model
        return model.get_input_embeddings().weight.detach()

    def exact_in(self, weight_type: str) -> bool:
        """Whether that type represents every stored weight exactly."""
        return weight_type == "fp32" or self.stored == {STORED.get(weight_type)}

    @torch.no_grad()
    def generate(self, ids: Ids, tokens: int, stop: frozenset[int] = frozenset(), keep_logits: bool = False) -> Answer:
        """Greedy continuation of sequences of equal length, [sequences, n].

        A single sequence ends at a token of `stop`, which is included. Without `keep_logits`, the logits are empty.
        """
        cache, given = None, torch.from_numpy(np.array(ids, np.int64))
        chosen: list[Any] = []
        logits: list[Any] = []
        while len(chosen) < tokens:
            with _refusing(self.path, "run"):
                step = self.model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = step.past_key_values, step.logits[:, -1].argmax(dim=1, keepdim=True)
            chosen.append(given)
            if keep_logits:
                logits.append(step.logits[:, -1:])
            if len(ids) == 1 and int(given) in stop:
                break
        if not chosen:
            return Answer(np.zeros((len(ids), 0), np.int64), np.zeros((len(ids), 0, 0), np.float32))
        kept = torch.cat(logits, dim=1).numpy() if logits else np.zeros((len(ids), 0, 0), np.float32)
        return Answer(torch.cat(chosen, dim=1).numpy(), kept)

    def empty_cache(self) -> Any:
        """A K/V cache for `trace` that keeps all rows of every layer, even with a sliding window."""
        return transformers.DynamicCache()

    def cached_rows(self, cache: Any) -> list[tuple[Floats, Floats]] | None:
        """K and V [n, heads * head_dim] of each layer of a cache; None if the layers cache something else."""
        pairs: list[tuple[Any, Any]] = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers
        ]
        if any(rows is None or rows.ndim != 4 for pair in pairs for rows in pair):
            return None
        return [(_flat(keys[0].float()), _flat(values[0].float())) for keys, values in pairs]

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight by name, including a head tied to the embedding."""
        return {alone: tuple(self.model.get_parameter(name).shape) for alone, name in self._names.items()}

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Parameter names by their names in a text-only model (the same unless multimodal)."""
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        return text_names(names) if is_multimodal(self.config.to_dict()) else {name: name for name in names}

    @torch.no_grad()
    def embedding(self, start: int, stop: int | None) -> Floats:
        """Rows [start, stop) of the embedding table, in float32."""
        return np.asarray(self.model.get_input_embeddings().weight[start:stop].float().numpy())

    @torch.no_grad()
    def head(self, start: int, stop: int | None) -> Floats:
        """Rows [start, stop) of the output embedding (lm_head), in float32."""
        return np.asarray(self.model.get_output_embeddings().weight[start:stop].float().numpy())

    @torch.no_grad()
    def weight(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows [start, stop) of a weight, in float32."""
        return np.asarray(self.model.get_parameter(self._names[name])[start:stop].float().numpy())

    def dtype(self, name: str) -> str:
        """The type of `finite_rows`. With these two methods, axc.weights can read from transformers' tensors."""
        return "FLOAT"

    def finite_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows [start, stop) of a weight, in float32."""
        return self.weight(name, start, stop)

    @torch.no_grad()
    def run_layers(
        self, hidden: list[Floats], history: list[tuple[Floats, Floats]], heads: list[int]
    ) -> tuple[list[Floats], list[tuple[Floats, Floats]]]:
        """Runs each layer on its own hidden states [n, H]: its outputs [n, H] and its new K and V [n, width].

        The layers are not chained. If the model scales its embedding, the first layer's input is scaled alike.
        `history` is K and V [past, width] per layer, with `heads` heads.
        """
        cache = self.empty_cache()
        for index, ((keys, values), count) in enumerate(zip(history, heads, strict=True)):
            if len(keys):
                cache.update(_headed(keys, count), _headed(values, count), index)
        outputs: list[Any] = []
        given = [torch.from_numpy(rows)[None] for rows in hidden]
        table = self.model.get_input_embeddings().weight
        token = int(table[:TOKENS].float().abs().amax(dim=1).argmax())

        def before(index: int, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            own = given[index]
            if index == 0:
                embedded = (arguments[0] if arguments else named["hidden_states"])[0, 0].float()
                at = int(table[token].float().abs().argmax())
                own = own * (embedded[at] / table[token, at].float())
            if arguments:
                return (own, *arguments[1:]), named
            return arguments, {**named, "hidden_states": own}

        def after(_: Any, __: Any, out: Any) -> None:
            outputs.append((out[0] if isinstance(out, tuple) else out)[0].clone())

        hooks = []
        for index, layer in enumerate(self._layers):
            own: Any = functools.partial(before, index)
            hooks += [layer.register_forward_pre_hook(own, with_kwargs=True), layer.register_forward_hook(after)]
        past = len(history[0][0])
        ids = torch.full((1, len(hidden[0])), token)
        try:
            with _refusing(self.path, "run"):
                self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        rows = [(keys[past:], values[past:]) for keys, values in self.cached_rows(cache) or ()]
        return [out.numpy() for out in outputs], rows

    def resample_cache(
        self, cache: Any, rows: Ids, trend: Floats, rounded: Callable[[Floats], Floats]
    ) -> tuple[Any, list[tuple[Floats, Floats]]] | None:
        """A new cache of the selected `rows` of a cache, `rounded`; also as K and V [n, heads * head_dim] per layer.

        V gets a component that follows `trend` [n], from -1 to 1, so that its mean depends on the rows attended to.
        None if the layers cache something other than K and V.
        """
        made, flat = self.empty_cache(), list[tuple[Floats, Floats]]()
        for index, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.ndim != 4 or values.ndim != 4:
                return None
            whole: Floats = np.asarray(values[0], np.float32)
            common = whole[:, whole.shape[1] // 2, None] * trend[:, None]
            k, v = (
                torch.from_numpy(rounded(np.asarray(kept, np.float32)))
                for kept in (keys[0][:, rows], whole[:, rows] / 2 + common)
            )
            made.update(k[None], v[None], index)
            flat.append((_flat(k), _flat(v)))
        return made, flat

    def _read_config(self, source: Path, model_type: str | None) -> Any:
        """The config, read by its own model_type: a wrong --model_type must not affect the reference."""
        with _refusing(source):
            if source.suffix == GGUF:
                found, remarks = gguf_reading.config(source)
                self.remarks += remarks
                return found
            values, _ = transformers.PreTrainedConfig.get_config_dict(source, local_files_only=True)
            own = values.get("model_type")
            if own in CONFIG_MAPPING:
                return transformers.AutoConfig.from_pretrained(source, **LOCAL)
            if model_type is not None and model_type in CONFIG_MAPPING:
                self.remarks.append(
                    f"transformers {transformers.__version__} does not know model_type {own!r}: the reference is a "
                    f"{model_type}, as given by --model_type; this choice is not checked"
                )
                return CONFIG_MAPPING[model_type].from_dict({**values, "model_type": model_type})
        raise NoReference(f"transformers {transformers.__version__} does not know model_type {own!r} of {source}")

    def _types(self) -> set[torch.dtype]:
        """The element types of the weights, after dequantisation if they are quantised."""
        if self._quantised is not None:
            return {torch.float32}
        return gguf_reading.stored_types(self.path) if self.path.suffix == GGUF else _stored_types(self.path)

    def _load(self, dtype: torch.dtype, skeleton: Any) -> Any:
        how: dict[str, Any] = {"config": self.config, "dtype": dtype, "output_loading_info": True}
        how["ignore_mismatched_sizes"] = True  # refused below, by name
        with _refusing(self.path):
            if self.path.suffix == GGUF:
                tensors = gguf_reading.weights(self.path, skeleton)
                model, report = type(skeleton).from_pretrained(None, state_dict=tensors, **how)
            elif self._quantised is not None:
                tensors = quantised_reading.weights(self.path, self._quantised, _mapped, {*skeleton.state_dict()})
                model, report = type(skeleton).from_pretrained(None, state_dict=tensors, **how)
            else:
                model, report = auto_class(self.config).from_pretrained(self.path, weights_only=True, **how, **LOCAL)
        kind = type(model).__name__
        for name, stored, wanted in sorted(report["mismatched_keys"]):
            raise Refused(f"{kind} of transformers has {name} in {list(wanted)}, {self.path} in {list(stored)}")
        for what, names in (("misses", report["missing_keys"]), ("does not use", report["unexpected_keys"])):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise Refused(f"{kind} of transformers {what} {min(names)}{more}: {self.path} is not its checkpoint")
        if report["error_msgs"]:
            raise Refused(f"{kind} of transformers cannot load {self.path}: {report['error_msgs'][0]}")
        return model.eval()

    def _stream(self) -> None:
        """Converts a layer's weights to float32 only while it runs, all other weights now."""
        narrow = [name for name, buffer in self.model.named_buffers() if buffer.dtype in WIDENED]
        if narrow:
            raise BadInput(
                f"the float32 reference of {self.path} does not fit in memory, and {narrow[0]} cannot be converted "
                "layer by layer\nClose other programs, or skip the comparison: llm_build --check_level 0."
            )
        self.remarks.append("memory is short: the reference converts one layer at a time to float32")
        inside = {id(weight) for layer in self._layers for weight in layer.parameters()}
        for weight in self.model.parameters():
            if id(weight) not in inside:
                weight.data = weight.data.float()
        for layer in self._layers:
            stored = [(weight, weight.data) for weight in layer.parameters()]

            def widen(*_: Any, stored: Any = stored) -> None:
                for weight, data in stored:
                    weight.data = data.float()

            def restore(*_: Any, stored: Any = stored) -> None:
                for weight, data in stored:
                    weight.data = data

            layer.register_forward_pre_hook(widen)
            layer.register_forward_hook(restore, always_call=True)


def tokenizer(path: Path) -> Any:
    """AutoTokenizer of the folder. Raises Refused, also if transformers invents one with special tokens only."""
    transformers.logging.set_verbosity_error()
    auto: Any = transformers.AutoTokenizer
    with _refusing(path):
        found = gguf_reading.tokenizer(path)[0] if path.suffix == GGUF else auto.from_pretrained(path, **LOCAL)
        if not set(found.get_vocab()) - set(found.all_special_tokens):
            raise Refused(f"{path} has no tokenizer that transformers {transformers.__version__} finds")
        return found


@contextlib.contextmanager
def _refusing(path: Path, what: str = "load") -> Iterator[None]:
    """Converts any exception of transformers to Refused, in one line: cannot load, or cannot run, the folder."""
    logger = logging.getLogger("transformers")
    silent, logger.disabled = logger.disabled, True
    try:
        yield
    except (BadInput, KeyboardInterrupt):
        raise
    except Exception as error:  # its loaders can raise anything
        text = " ".join(str(error).split())[:240] or type(error).__name__
        if marked := [file.name for file in sorted(path.glob("*.json")) if _has_byte_order_mark(file)]:
            text += f"\n{', '.join(marked)} begins with a byte order mark: remove its first 3 bytes"
        raise Refused(f"transformers {transformers.__version__} cannot {what} {path}: {text}") from None
    finally:
        logger.disabled = silent


def _has_byte_order_mark(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    except OSError:
        return False


def _stored_types(path: Path) -> set[torch.dtype]:
    """The element types in all weight files of the folder."""
    found: set[torch.dtype] = set()
    for pattern in WEIGHTS:
        for file in sorted(file for file in path.glob(pattern) if file.is_file()):
            found |= {tensor.dtype for tensor in load_state_dict(file, map_location="meta").values()}
    return found


def _mapped(file: Path) -> dict[str, Any]:
    return dict(load_state_dict(file, map_location="cpu"))


def _flat(rows: Any) -> Floats:
    """[heads, n, head_dim] to the layout of a bundle, [n, heads * head_dim]."""
    return np.asarray(rows.transpose(0, 1).reshape(rows.shape[1], -1).numpy())


def _headed(rows: Floats, heads: int) -> Any:
    """[n, heads * head_dim] to the layout of a cache, [1, heads, n, head_dim]."""
    return torch.from_numpy(rows).reshape(len(rows), heads, -1).transpose(0, 1)[None]


def _count(module: Any) -> int:
    """The number of weights; shared ones count once."""
    return sum(int(weight.numel()) for weight in module.parameters())


def auto_class(config: Any) -> Any:
    """AutoModelForCausalLM, or AutoModelForImageTextToText for a multimodal config."""
    causal: Any = transformers.AutoModelForCausalLM
    multimodal = (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    return transformers.AutoModelForImageTextToText if multimodal else causal


def _decoder_layers(model: Any) -> Any:
    """The decoder's layers: the largest module list with num_hidden_layers entries. Raises Refused."""
    length, text = model.config.get_text_config().num_hidden_layers, model.get_decoder()
    lists = [m for m in text.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == length]
    if not lists:
        raise Refused(f"{type(model).__name__} of transformers has no list of {length} layers")
    return max(lists, key=_count)
