"""A bundle becomes a model: held against its manifest if asked, then against memory, then loaded part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from axrun.format import bundle as bundles
from axrun.format.bundle import Bundle
from axrun.memory import Allow, refuse, remaining, require
from axrun.model import Model
from axrun.progress import Progress, Show, unseen

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Where nobody listens."""


@dataclass(frozen=True)
class Loading:
    """How a bundle is loaded, and who is told.

    `verify` holds every file against the manifest first. `threads` None: one for each CPU. `allow` is asked where
    memory is too small. `say` gets console lines, `progress` how far the work is.
    """

    verify: bool = False
    engine: str = "ax"
    threads: int | None = None
    allow: Allow = refuse
    say: Say = silent
    progress: Show = unseen

    def open(self, path: Path) -> Bundle:
        """Raises BadInput for a bundle that cannot be used, CheckFailed when it is not as built."""
        if self.verify:
            bundles.verify(path)
        return Bundle.open(path)

    def load(self, bundle: Bundle) -> Model:
        """Raises BadInput when memory is too small and `allow`, asked with the numbers, says no."""
        require(bundle, self.engine, self.allow)
        parts = iter(range(1, bundle.layers + 3))

        def loaded(what: str) -> None:
            self.progress(Progress(next(parts), bundle.layers + 2, f"{what},{remaining()}"))

        return Model.load(bundle, self.engine, self.threads, loaded)


DEFAULTS = Loading()


def describe(model: Model, bundle: Bundle) -> Iterator[str]:
    """What the vendor's runner says of a loaded model; there too, a group without history counts as one of 1 row."""
    prefill = [group for group in model.decoder.groups if group.tokens > 1]
    yield f"max_token_len : {model.context}"
    yield f"kv_cache_size : {model.decoder.kv_size}, kv_cache_num: {model.context}"
    if prefill:
        yield f"prefill_token_num : {prefill[0].tokens}"
        yield from (f"grp: {group.index}, prefill_max_kv_cache_num : {max(group.history, 1)}" for group in prefill)
        yield f"prefill_max_token_num : {max(group.history for group in prefill) or 1}"
    yield f"load config: {json.dumps(dict(bundle.post_config), sort_keys=True)}"
    yield "LLM init ok"
