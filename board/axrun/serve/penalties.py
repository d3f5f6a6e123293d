"""What a request adds to logits before a token is drawn: penalties and biases of OpenAI's interface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Penalties:
    """`presence` for a token that is in the answer, `frequency` for each time it is, `bias` by token id."""

    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __call__(self, logits: Floats, answer: Counter[int]) -> Floats:
        """Logits [vocab] with them; https://platform.openai.com/docs/guides/text-generation#frequency-and-presence-penalties"""
        penalised = answer if self.presence or self.frequency else {}
        if not penalised and not self.bias:
            return logits
        logits = logits.copy()
        if penalised:
            counts = np.fromiter(answer.values(), np.float32, len(answer))
            logits[np.fromiter(answer, np.int64, len(answer))] -= counts * self.frequency + self.presence
        if self.bias:
            added = np.fromiter(self.bias.values(), np.float32, len(self.bias))
            logits[np.fromiter(self.bias, np.int64, len(self.bias))] += added
        return logits
