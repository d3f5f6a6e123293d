"""The fixed work whose instructions ci/nightly/instructions.py counts: python counted.py BUNDLE, under callgrind.

A prompt and a greedy answer behind it, once to warm up, then to be counted. getpgid(2) marks where counting begins,
getsid(2) where it ends.
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
    gc.disable()  # when it would run depends on what was imported
    for _ in range(REPEAT):
        os.getpgid(0)
        work(model, bundle.vocab_size)
        os.getsid(0)
