"""One bundle of a server: its names, how its requests are read, and how it is loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axrun import memory
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.format.pooling import Pooling
from axrun.kv_pool import Pool
from axrun.load import Loading, describe
from axrun.prompt_cache import PromptCache
from axrun.sampling.checkpoint import sampling_of
from axrun.sampling.grammar import Compiler
from axrun.serve.metrics import Metrics
from axrun.serve.order import Reader
from axrun.serve.scheduler import READY, Scheduler, Write
from axrun.serve.slots import SPARE, Slot, allocate
from axrun.serve.tools import Toolbox
from axrun.serve.writer import Writer
from axrun.session import engine_version
from axrun.speculation import Speculation, draft
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from axrun.serve.server import Options

# bits of a weight by type, without scales
BITS = {"s8": 8, "s4": 4, "fp8_e4m3": 8, "fp8_e5m2": 8, "bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True)
class Parts:
    """What answers need besides the model."""

    reader: Reader
    tokenizer: Tokenizer
    draft: Bundle | None = None


class Served:
    """`name` is the model's name in answers, `names` are all that a request may give. `alone`: it is the only bundle.

    `scheduler` is set while the model is loaded or being loaded. `active` counts the requests that need it now, `used`
    orders the models by their last request; `leaving`: no further request may begin.
    """

    def __init__(
        self, bundle: Bundle, names: Sequence[str], options: Options, loading: Loading, metrics: Metrics, alone: bool
    ) -> None:
        self.bundle, self.name, self.names = bundle, names[0], tuple(names)
        self.metrics, self._options, self._loading, self._alone = metrics, options, loading, alone
        self.fingerprint = f"fp_{bundle.digest[:10]}"
        # Both from the sizes of the files now: they may be deleted later, while the model is loaded.
        self._kv_limit = None if options.kv_cache_mb is None else options.kv_cache_mb << 20
        self._needs = memory.needs(bundle, loading.engine, options.slots, self._kv_limit)
        self._mapped = memory.mapped(bundle, loading.engine)
        self._pool: Pool | None = None
        self.scheduler: Scheduler | None = None
        self.active = self.used = 0
        self.leaving = False
        self._created = int(time.time())
        self._parts: Parts | None = None
        self._prompt_cache: PromptCache | None = None
        self._lock = threading.Lock()

    @property
    def slowdown(self) -> float:
        return self._options.max_slowdown

    @property
    def loaded(self) -> bool:
        return self.scheduler is not None and self.scheduler.state == READY

    @property
    def held(self) -> int:
        """Bytes that it takes while loaded although the system counts them as free: mapped files, unwritten blocks."""
        return self._mapped + (0 if self._pool is None else self._pool.promised)

    @property
    def freed(self) -> int:
        """Bytes of memory that unloading it frees, `held` included."""
        needs = self._needs
        kv_cache = needs.kv_cache if self._pool is None else self._pool.nbytes
        return needs.weights + kv_cache + needs.buffers - memory.runtime_bytes(self._loading.engine)

    @property
    def parts(self) -> Parts:
        """Built at the first use. Raises BadInput."""
        with self._lock:
            if self._parts is None:
                self._parts = self._build()
            return self._parts

    def _build(self) -> Parts:
        bundle, options, say = self.bundle, self._options, self._loading.say
        tokenizer = Tokenizer.open(bundle.hf)
        sampling, remark = sampling_of(bundle, options.generation_config)
        if remark:
            say(f"note: {remark}")
        template = ChatTemplate.find(bundle.hf)
        reader = Reader(
            tokenizer,
            template,
            sampling,
            Compiler(tokenizer, bundle.vocab_size),
            Toolbox(template, tokenizer, options.tool_format),
            bundle,
            options.parse_special,
            options.reasoning_budget,
        )
        draft_bundle = None if options.draft is None else draft.open_for(bundle, options.draft, self._loading)
        if options.prompt_cache is not None and self._prompt_cache is None:
            engine = self._loading.engine
            identity = f"{bundle.digest} {engine} {engine_version(engine)}"
            folder = Path(options.prompt_cache) if self._alone else Path(options.prompt_cache) / bundle.digest[:16]
            self._prompt_cache = PromptCache(folder, identity, options.prompt_cache_mb << 20, say)
        return Parts(reader, tokenizer, draft_bundle)

    @property
    def reader(self) -> Reader:
        """Reads requests. Raises BadInput."""
        return self.parts.reader

    def load(self, held: int = 0) -> tuple[Sequence[Slot], Write]:
        """Loads the model, with its slots; what a scheduler calls. `held`: see `shortage`. Raises BadInput."""
        options, loading, parts = self._options, self._loading, self.parts
        model = loading.load(self.bundle)
        for line in describe(model, self.bundle):
            loading.say(line)
        speculation = Speculation.load(parts.draft, loading) if options.speculation else None
        slots = allocate(model, options.slots, loading.allow, self._kv_limit, loading.say, held=held + self._mapped)
        self._pool = slots[0].pool
        return slots, Writer(parts.tokenizer, self._prompt_cache, speculation).write

    def join(self) -> None:
        """Waits for the scheduler to end."""
        if self.scheduler is not None:
            self.scheduler.join()

    def forget(self) -> None:
        """Drops everything that takes memory; the scheduler must have ended."""
        self.scheduler = self._parts = self._pool = None
        self.metrics.forget()

    def close(self) -> None:
        """Writes what the prompt cache still has to write."""
        if self._prompt_cache is not None:
            self._prompt_cache.close()

    def expect_unchanged(self) -> None:
        """Raises BadInput or CheckFailed if the files on disk are no longer those that the server was started with."""
        if Bundle.open(self.bundle.path).digest != self.bundle.digest:
            raise BadInput(f"{self.bundle.path} has changed since the server was started\nRestart the server.")

    def shortage(self, held: int, least: bool = False) -> memory.Shortage | None:
        """What is missing to load it, if anything. `held`: bytes that other models hold and that count as free.

        `least`: with keys and values of a single context, if the slots can share those.
        """
        slots, limit = self._options.slots, self._kv_limit
        if least and limit is None and memory.pools(self.bundle, self._loading.engine):
            slots = 1
        return memory.shortage(self.bundle, self._loading.engine, slots=slots, held=held + SPARE, kv_limit=limit)

    def json(self) -> Mapping[str, Any]:
        """Its entry in /v1/models."""
        bundle = self.bundle
        weights, calibration = bundle.flag("weight_type"), bundle.manifest.get("calibration")
        bits = calibration.get("bits") if isinstance(calibration, dict) else None
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "axrun",
            "context_length": bundle.kv_cache_len,
            "family": bundle.model_type,
            "weight_type": weights,
            "bits": BITS.get(weights) if bits is None else bits,
            "embeddings": bundle.flag("ret_postnorm") == "True",
            "text": not Pooling.of(bundle.manifest).only,
            "loaded": self.loaded,
            "aliases": list(self.names[1:]),
        }
