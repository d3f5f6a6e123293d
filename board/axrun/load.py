"""Loading of a bundle: verify it if requested, check the free memory, load it part by part."""

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
    """Default callback: discards the text."""


@dataclass(frozen=True)
class Loading:
    """Options and callbacks for loading a bundle.

    `verify`: verify every file against the manifest first. `threads` None: one per CPU. `allow` decides whether to
    continue if memory is too small. `say` receives console lines, `progress` the progress.
    """

    verify: bool = False
    engine: str = "ax"
    threads: int | None = None
    allow: Allow = refuse
    say: Say = silent
    progress: Show = unseen

    def open(self, path: Path) -> Bundle:
        """Raises BadInput for a bundle that cannot be used, CheckFailed if it fails verification."""
        if self.verify:
            bundles.verify(path)
        return Bundle.open(path)

    def load(self, bundle: Bundle) -> Model:
        """Raises BadInput if memory is too small and `allow(message)` returns False."""
        require(bundle, self.engine, self.allow)
        parts = iter(range(1, bundle.layers + 3))

        def loaded(what: str) -> None:
            self.progress(Progress(next(parts), bundle.layers + 2, f"{what},{remaining()}"))

        return Model.load(bundle, self.engine, self.threads, loaded)


DEFAULTS = Loading()


def describe(model: Model, bundle: Bundle) -> Iterator[str]:
    """The lines the vendor's runner prints for a loaded model; like it, counts no history as 1 row."""
    prefill = [group for group in model.decoder.groups if group.tokens > 1]
    yield f"max_token_len : {model.context}"
    yield f"kv_cache_size : {model.decoder.kv_size}, kv_cache_num: {model.context}"
    if prefill:
        yield f"prefill_token_num : {prefill[0].tokens}"
        yield from (f"grp: {group.index}, prefill_max_kv_cache_num : {max(group.history, 1)}" for group in prefill)
        yield f"prefill_max_token_num : {max(group.history for group in prefill) or 1}"
    yield f"load config: {json.dumps(dict(bundle.post_config), sort_keys=True)}"
    yield "LLM init ok"
