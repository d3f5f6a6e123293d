"""A fixed piece of arithmetic, run alone on the board; prints its processor time in seconds.

It mixes small matrix products with interpreter work, like the runner.
"""

import statistics
import time

import numpy as np

REPEAT, STEPS = 200, 3

rows, weight = np.ones((16, 128), np.float32), np.full((128, 384), 0.01, np.float32)


def work() -> None:
    hidden = rows
    for _ in range(STEPS):
        hidden = np.tanh((hidden @ weight)[:, :128])


def seconds() -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


print(statistics.median(seconds() for _ in range(REPEAT)))
