"""Several sequences in one run: tokens per second of all, and the gaps between tokens while a prompt is read.

`make bench ARGS='-k batch'`. llama.cpp joins as in bench_engine: its llama_decode takes one token of each sequence in
one batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.bench.bench_engine import CASES, GGUF, SHAPES, llm_build, script
from tests.bench.tables import record
from tests.engine.conftest import build

ROUNDS, SEQUENCES = 3, 8
WEIGHTS = ("s8", "s4")

# Each prints a JSON object: seconds of a step of 1 and of several sequences, each behind 16 tokens; ours also the 99th
# percentile of the gaps between the tokens of one answer, alone and while prompts of 1000 tokens are read beside it.
OURS = """
import json, sys, time
import numpy as np
from axrun.batch import Batch
from axrun.format.bundle import Bundle
from axrun.job import Job, compute
from axrun.model import Model
from axrun.sequence import Sequence
from axrun.serve.pace import GUESS_ROWS, Pace
count, random, clock = int(sys.argv[2]), np.random.default_rng(0), time.perf_counter
first = Model.load(Bundle.open(sys.argv[1]), threads=2)
sequences = [Sequence(model) for model in (first, *(first.another() for _ in range(count - 1)))]
batch, most = Batch(first, first.decoder.most + GUESS_ROWS), first.decoder.most
def ids(number):
    return random.integers(0, 1000, number).tolist()
def run(jobs):
    results = batch.run(jobs) if len(jobs) > 1 else [compute(jobs[0])]
    for job, result in zip(jobs, results):
        job.sequence.ids += job.tokens[: len(result.hidden)]
        for logits in result.logits:
            logits.argmax()
def timed(jobs):
    started = clock()
    run(jobs)
    return clock() - started
def step(several):
    return timed([Job(sequence, ids(1), 0) for sequence in several])
def begin():
    for sequence in sequences:
        sequence.truncate(0)
        run([Job(sequence, ids(16), 15)])
begin()
out = {"1": min(step(sequences[:1]) for _ in range(60))}
begin()
out[str(count)] = min(step(sequences) for _ in range(60))
begin()
answer, reader = sequences[:2]
pace = Pace(2.5, most)
alone, beside = [], []
for _ in range(200):
    alone.append(timed([Job(answer, ids(1), 0)]))
    pace.learn(alone[-1], 1, 0)
for _ in range(3):
    answer.truncate(100)
    reader.truncate(0)
    prompt = ids(1000)
    while reader.length < len(prompt):
        rest = prompt[reader.length:]
        jobs = pace.cut([Job(answer, ids(1), 0), Job(reader, rest, len(rest) - 1)])
        beside.append(timed(jobs))
        pace.learn(beside[-1], 1, len(jobs[1].tokens))
out |= {"gap": float(np.quantile(alone, 0.99)), "gap while reading": float(np.quantile(beside, 0.99))}
print(json.dumps(out))
"""

LLAMA = """
import json, sys, time
import llama_cpp as L
import numpy as np
count, random, clock = int(sys.argv[2]), np.random.default_rng(0), time.perf_counter
L.llama_backend_init()
quiet = L.llama_log_callback(lambda *_: None)
L.llama_log_set(quiet, None)
model = L.llama_model_load_from_file(sys.argv[1].encode(), L.llama_model_default_params())
vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
params = L.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 1024, 512, 512, 2, 2
params.n_seq_max = count
def measure(flash_attention):
    params.flash_attn_type = flash_attention
    context = L.llama_init_from_model(model, params)
    batch = L.llama_batch_init(512, 0, 1)
    def decode(rows):
        batch.n_tokens = len(rows)
        for place, (sequence, position) in enumerate(rows):
            batch.token[place], batch.pos[place] = int(random.integers(0, 1000)), position
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, sequence, 1
        started = clock()
        assert L.llama_decode(context, batch) == 0
        for place in range(len(rows)):
            np.ctypeslib.as_array(L.llama_get_logits_ith(context, place), (vocabulary,)).argmax()
        return clock() - started
    out = {}
    for sequences in (1, count):
        L.llama_memory_clear(L.llama_get_memory(context), True)
        decode([(sequence, position) for sequence in range(sequences) for position in range(16)])
        steps = range(16, 76)
        out[str(sequences)] = min(decode([(s, position) for s in range(sequences)]) for position in steps)
    L.llama_batch_free(batch)
    L.llama_free(context)
    return out
with_it, without = measure(L.LLAMA_FLASH_ATTN_TYPE_ENABLED), measure(L.LLAMA_FLASH_ATTN_TYPE_DISABLED)
print(json.dumps({what: min(with_it[what], without[what]) for what in with_it}))
"""


@pytest.mark.parametrize("weight", WEIGHTS)
def test_batch_of_sequences(
    weight: str, checkpoint: Path, llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    measure(weight, checkpoint, llama, benchmark, tmp_path)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_batch_of_sequences_on_a_small_model(
    weight: str, small: Path, llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    measure(weight, small, llama, benchmark, tmp_path)


def measure(weight: str, checkpoint: Path, llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Builds both files, measures in turns and prints the table; the best of the rounds counts."""
    bundle, gguf, peer = tmp_path / "bundle", tmp_path / "weights.gguf", CASES[weight]
    llm_build(checkpoint, bundle, weight)
    libraries = str(build("native"))
    rivals: dict[str, Any] = {"ax": lambda: script(sys.executable, OURS, bundle, SEQUENCES, AXRUN_ENGINE=libraries)}
    if llama:
        script(llama, GGUF, checkpoint, gguf, peer)
        rivals["llama.cpp"] = lambda: script(llama, LLAMA, gguf, SEQUENCES)
    best: dict[str, dict[str, float]] = {name: {} for name in rivals}

    def round_() -> None:
        for name, rival in rivals.items():
            for what, seconds in json.loads(rival()).items():
                best[name][what] = min(best[name].get(what, seconds), seconds)

    benchmark.pedantic(round_, rounds=ROUNDS)
    benchmark.extra_info["best"] = best
    one, all_ = "1", str(SEQUENCES)
    rates = {name: (1 / seen[one], SEQUENCES / seen[all_]) for name, seen in best.items()}
    rows = [
        [f"{weight}, {name}", *(f"{rate:.0f}" for rate in rates[name]), f"{rates[name][1] / rates[name][0]:.2f}x"]
        for name in rivals
    ]
    model, key = SHAPES.get(checkpoint.name, (checkpoint.name, "other"))
    gaps = [best["ax"][what] for what in ("gap", "gap while reading")]
    headlines = []
    if llama:
        what = f"{SEQUENCES} sequences, {model} {weight}"
        seen = f"{rates['ax'][1]:.0f} tokens/s", f"llama.cpp {peer} {rates['llama.cpp'][1]:.0f} tokens/s"
        headlines.append((what, *seen, f"{rates['ax'][1] / rates['llama.cpp'][1]:.2f}x as fast"))
    record(
        benchmark,
        f"batch-{key}",
        f"Several sequences: {model} shapes, two cores, tokens/s",
        ["", "1 sequence", f"{SEQUENCES} sequences", "ratio"],
        rows,
        unit="tokens/s",
        note=f"{weight}: the 99th percentile of the gap between two tokens of an answer is {gaps[0] * 1e3:.1f} ms, and "
        f"{gaps[1] * 1e3:.1f} ms while prompts of 1000 tokens are read ({gaps[1] / gaps[0]:.1f}x).",
        headlines=headlines,
    )
