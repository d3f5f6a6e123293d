"""A budget of tokens for thinking: when it is spent, the mark that ends the thoughts is the only token left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Budget:
    """A logits processor. `begin` None: the answer starts with thoughts; else only if this is its first token."""

    tokens: int
    begin: int | None
    end: int

    def __call__(self, logits: NDArray[np.float32], ids: Sequence[int], start: int) -> None:
        answer = ids[start:]
        thoughts = len(answer) - (self.begin is not None)
        thinks = self.begin is None or (len(answer) > 0 and answer[0] == self.begin)
        if thinks and thoughts >= self.tokens and self.end not in answer:
            kept = logits[self.end]
            logits[:] = -np.inf
            logits[self.end] = kept if np.isfinite(kept) else 0
