"""The fixed workload for ci/nightly/instructions.py: python counted.py BUNDLE, run under callgrind.

A prompt and a greedy answer: first as warm-up, then counted. callgrind starts counting at getpgid(2) and stops at
getsid(2).
"""

import gc
import os
import sys
from pathlib import Path

from axrun.format.bundle import Bundle
from axrun.generate import generate
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sequence import Sequence

PROMPT, TOKENS, STRIDE, REPEAT = 192, 32, 7919, 3


def work(model: Model, vocabulary: int) -> None:
    prompt = min(PROMPT, model.context - TOKENS)
    ids = [(STRIDE * index + 1) % vocabulary for index in range(prompt)]
    for _ in generate(Sequence(model), ids, Sampling(), TOKENS):
        pass


if __name__ == "__main__":
    bundle = Bundle.open(Path(sys.argv[1]))
    model = Model.load(bundle, "ax", threads=1)
    work(model, bundle.vocab_size)
    gc.collect()
    gc.disable()  # its timing depends on the imported modules
    for _ in range(REPEAT):
        os.getpgid(0)
        work(model, bundle.vocab_size)
        os.getsid(0)
