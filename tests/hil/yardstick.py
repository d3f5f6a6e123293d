"""A fixed piece of arithmetic, run on the board by itself: prints the processor time that it takes, seconds.

Small matrices between steps of the interpreter, as the runner's own work is.
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
