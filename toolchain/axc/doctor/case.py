"""The bundle under examination and its reference data; each item is loaded once, on first use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc import build, config, expected, expected_graphs, hf_folder
from axc import compile as compiler
from axc.bundle import input_name
from axc.calibration.file import Calibrated, entries
from axc.checkpoints import Checkpoint, Lora
from axc.checkpoints.gguf import SUFFIX as GGUF
from axc.existing import CALIBRATION
from axc.graph import Vector, Weight
from axc.quantizer.kept import Kept
from axc.weights import Source
from axrun import session
from axrun.agreement import Noise, explained
from axrun.doctor.bounds import bounded
from axrun.doctor.report import Finding
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import MANIFEST, Bundle, sha256
from axrun.format.dtypes import FLOATS
from axrun.text.template import ChatTemplate, prompt_ids
from axrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from axc.reference import Reference

Say = Callable[[str], None]

ENGINES = ("ax", "ort")  # they share no code
REBUILD = "Build the bundle again with `axc llm_build`."
REPORT = "The compiler is at fault: report it with this output."
COMPARED = ("tokenizer", "template", "embedding", "layers", "post", "answer")  # stages that compare with the checkpoint
MODEL_CONFIG = "model_config"  # the manifest's name of a config.json given with --model_config


@dataclass(frozen=True)
class Options:
    """`engine` is auto (the runner's default) or one of ENGINES. `prompt` is for the stage `answer`."""

    bundle: Path
    checkpoint: Path
    model_config: Path | None = None
    model_type: str | None = None
    engine: str = "auto"
    prompt: str = "1+1="
    lora: tuple[Lora, ...] = ()


class Unusable(Exception):
    """The checkpoint, not the bundle, is unusable: ends the examination with the BadInput in its argument."""


class Case:
    """A bundle and its checkpoint. `say` gets progress.

    Stages store results for later stages in `examined`. `config` is the checkpoint's config by our own reader; it is
    only used to detect a checkpoint of another model, and to name differences.
    """

    def __init__(self, options: Options, say: Say = lambda line: None) -> None:
        """Raises BadInput for a checkpoint that cannot be read."""
        self.options, self.say = options, say
        self.checkpoint = Checkpoint.open(options.checkpoint, options.lora)
        self.config = config.load(self.checkpoint, options.model_config, options.model_type)
        self.examined: dict[str, Any] = {}

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint's text files."""
        return self.checkpoint.folder

    def path_of(self, name: str) -> Path:
        """The path of a checkpoint file, by its name in the manifest."""
        if name in self._adapters:
            return self._adapters[name]
        single = self.checkpoint.gguf is not None
        return self.checkpoint.path.with_name(name) if single else self.checkpoint.path / name

    @functools.cached_property
    def _adapters(self) -> dict[str, Path]:
        """The files of the adapters, by the names that a manifest has for them."""
        given = self.options.lora
        return {input_name(file, self.folder, given): file for adapter in given for file in adapter.files}

    @functools.cached_property
    def bundle(self) -> Bundle:
        return Bundle.open(self.options.bundle)

    @functools.cached_property
    def calibrated(self) -> Mapping[str, Calibrated]:
        """The matrices that were calibrated; raises BadInput."""
        return entries(self.bundle.manifest)

    @functools.cached_property
    def stored(self) -> Checkpoint:
        """The checkpoint with the tensors that a build reads."""
        return self.checkpoint.tied() if self.config.tie_word_embeddings else self.checkpoint

    def followed(self, index: int) -> Mapping[str, str]:
        """The weights of a layer whose rows follow the columns of a tensor of the checkpoint, and that tensor."""
        target = expected_graphs.target(self.bundle.manifest)
        if target is None or not any(kind.reordered for kind in self.kept.values()):
            return {}
        parameters = compiler.layer_model(self.config, target, index, self.kept)[1].values()
        return {data.name: data.rows_as for data in parameters if isinstance(data, (Vector, Weight)) and data.rows_as}

    @functools.cached_property
    def kept(self) -> Mapping[str, Kept]:
        """The matrices whose quantisation levels are taken from the checkpoint unchanged; raises BadInput."""
        types = self.bundle.flag("weight_type"), self.bundle.flag("post_weight_type")
        return {
            **build.stored_types(self.stored, self.config, *types)[1],
            **{name: entry.kept(name) for name, entry in self.calibrated.items()},
        }

    @functools.cached_property
    def engine(self) -> str:
        return session.usual_engine() if self.options.engine == "auto" else self.options.engine

    @property
    def other_engine(self) -> str:
        return next(name for name in ENGINES if name != self.engine)

    @property
    def dtype(self) -> str:
        """ONNX's name of the hidden state's type."""
        return FLOATS[self.bundle.hidden_state_type]

    @functools.cached_property
    def reference(self) -> Reference:
        """The checkpoint as transformers loads it. Raises Unusable."""
        from axc.reference import Reference

        self.say("  loading the float32 reference")
        options = self.options
        try:
            found = Reference(options.checkpoint, options.model_config, options.model_type, adapters=options.lora)
        except BadInput as refused:
            raise Unusable(refused) from None
        found.set_context(self.bundle.kv_cache_len + 1)
        for remark in found.remarks:
            self.say(f"  {remark}")
        return found

    @functools.cached_property
    def weights(self) -> Mapping[str, Source]:
        """The sources of the axmodels' weights, by our own reader."""
        return compiler.weights(self.config)

    def weight(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of an axmodel's weight, computed from the tensors that transformers loaded."""
        source = self.weights[name]
        stop = source.shape[0] if stop is None else min(stop, source.shape[0])
        return np.asarray(source.rows(self.reference, start, stop), np.float32)

    @functools.cached_property
    def expected(self) -> expected.Expected:
        """The reference's results of a walk through the context. Raises Unusable for another model's checkpoint."""
        reference, bundle = self.reference, self.bundle
        asked = self._asked()[: bundle.kv_cache_len - 1]
        self.say("  running the reference")
        try:
            return expected.ask(reference, bundle, self.options.prompt, asked, keep_rows=True)
        except CheckFailed as refused:
            raise Unusable(BadInput(str(refused).partition("\n")[0])) from None

    def _asked(self) -> list[int]:
        """The token ids of the prompt as the runner encodes it; empty if the model has no such tokens."""
        if self.tokenizer is None:
            return []
        with bounded("the chat template"):
            ids = prompt_ids(self.tokenizer, ChatTemplate.find(self.bundle.hf), self.options.prompt)
        if ids and max(ids) >= self.bundle.vocab_size:
            self.say(f"  token id {max(ids)} of the prompt is outside the vocabulary: no answer is compared")
            return []
        return ids

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer as the runner loads it, which renders the chat template to find the end of a turn."""
        with bounded("the chat template"):
            return Tokenizer.find(self.bundle.hf)

    @functools.cached_property
    def theirs(self) -> Any:
        """transformers' tokenizer of the checkpoint; None if there is none. Raises Unusable."""
        if not any((self.folder / name).is_file() for name in hf_folder.TOKENIZERS):
            return None
        from axc.reference import tokenizer

        try:
            return tokenizer(self.options.checkpoint)
        except BadInput as refused:
            raise Unusable(refused) from None

    def noise(self, weight_type: str) -> Noise:
        """The error that the types of hidden state and weights explain."""
        exact = weight_type in self.expected.exact
        return explained(self.bundle.hidden_state_type, *([] if exact else [weight_type]))

    def other_model(self) -> tuple[str, Any, Any] | None:
        """The first difference between the models: (what, of the checkpoint, of the bundle); None if there is none."""
        bundle, model = self.bundle, self.config
        for what, seen, wanted in (
            ("model_type", model.model_type, bundle.model_type),
            ("layers", model.num_hidden_layers, bundle.layers),
            ("hidden size", model.hidden_size, bundle.hidden_size),
            ("vocabulary", model.vocab_size, bundle.vocab_size),
            ("K/V width", model.kv_size, bundle.kv_size),
        ):
            if seen != wanted:
                return what, seen, wanted
        return None

    def expect_same_model(self) -> Finding | None:
        """Raises BadInput for the checkpoint of another model.

        A finding instead, if the bundle was built from this very checkpoint: then the bundle is damaged.
        """
        self._expect_same_adapters()
        other = self.other_model()
        if other is None:
            return None
        what, seen, wanted = other
        inputs = self.bundle.manifest.get("inputs")
        names = [name for name in inputs or () if name == "config.json" or name.endswith(GGUF)]
        given = self.options.model_config is not None or self.options.model_type is not None
        if names and MODEL_CONFIG not in (inputs or ()) and not given and not {*names} & {*self.changed_inputs}:
            expected = f"{what} {seen}, as in {names[0]}, from which the bundle was built"
            cause = "the manifest was edited, or a part of the bundle is missing"
            return Finding("files", what, MANIFEST, expected, f"{wanted}", cause, REBUILD)
        raise BadInput(
            f"{self.options.checkpoint} is the checkpoint of another model: its {what} is {seen}, that of "
            f"{self.bundle.path} is {wanted}\nGive the checkpoint that the bundle was built from{self._flags()}."
        )

    def _expect_same_adapters(self) -> None:
        recorded = self.bundle.manifest.get("adapters")
        merged = [adapter.get("weight") for adapter in recorded or () if isinstance(adapter, dict)]
        given = [adapter.weight for adapter in self.options.lora]
        if merged != given:
            shown = [" ".join(f"{weight!a:.20}" for weight in weights) or "none" for weights in (merged, given)]
            raise BadInput(
                f"{self.bundle.path} was built with adapters of weight {shown[0]}, but --lora gives {shown[1]}\n"
                "Give the adapters of the build, in the same order: --lora DIR:WEIGHT."
            )

    def _flags(self) -> str:
        inputs = self.bundle.manifest.get("inputs")
        given = isinstance(inputs, dict) and MODEL_CONFIG in inputs and self.options.model_config is None
        return ", and the --model_config of the build" if given else ""

    @functools.cached_property
    def changed_inputs(self) -> list[str]:
        """Checkpoint files whose digest differs from the manifest's."""
        recorded = self.bundle.manifest.get("inputs")
        if not isinstance(recorded, dict):
            return []
        found = []
        for name, entry in sorted(recorded.items()):
            path = self.options.model_config if name == MODEL_CONFIG else self.path_of(name)
            strange = "/" in name and name not in self._adapters
            if strange or name == CALIBRATION or path is None or not isinstance(entry, dict):
                continue
            if not path.is_file() or path.stat().st_size != entry.get("size") or sha256(path) != entry.get("sha256"):
                found.append(name)
        return found

    def blame(self, finding: Finding) -> Finding:
        """The finding; if a relevant checkpoint file changed since the build, that becomes its cause."""
        if finding.stage not in COMPARED or finding.file.startswith("board/"):
            return finding
        changed = [name for name in self.changed_inputs if _matters(name, finding)]
        if not changed:
            return finding
        listed = " and ".join(changed[:2]) + f" and {len(changed) - 2} more" * (len(changed) > 2)
        cause = (
            f"{listed} of the checkpoint changed since the build: the digest in the manifest is another. Difference "
            f"between the two: {finding.cause}"
        )
        path = self.options.model_config if changed[0] == MODEL_CONFIG else self.path_of(changed[0])
        advice = "Give the checkpoint that the bundle was built from, or build the bundle again from this one."
        return dataclasses.replace(finding, file=str(path), cause=cause, advice=advice)


def _matters(name: str, finding: Finding) -> bool:
    """Whether a changed input of the build can explain a finding."""
    configs, weights = ("config.json", MODEL_CONFIG), (".safetensors", ".bin", ".index.json", GGUF)
    if finding.stage in ("tokenizer", "template"):
        return name.endswith(GGUF) or not name.endswith(weights)
    named = any(ending in f"{finding.part} {finding.cause}" for ending in (".weight", ".bias"))
    of_weights = finding.stage == "embedding" or (named and "config.json" not in finding.cause)
    return name.endswith(weights) or (not of_weights and name in configs)
