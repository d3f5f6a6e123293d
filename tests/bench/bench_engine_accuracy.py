"""Error of the logits with 8-bit weights: our engine compared with llama.cpp's Q8_0 of the same checkpoint.

`make bench ARGS='-k accuracy'`, with PEER=llama.cpp and BENCH_CHECKPOINT as in bench_engine.py. The reference is
transformers in float32; the measure is the mean Kullback-Leibler divergence of the next token's distribution.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Tokenizer

from axrun.measure.evaluate import log_softmax
from tests.bench.bench_engine import GGUF, ROOT, script
from tests.bench.tables import record
from tests.engine.conftest import build

TINY = ROOT / "models" / "tiny-qwen2"
Floats = NDArray[Any]

# Each saves the logits, float32 [tokens, vocabulary], of the ids in the second argument's file to the third's.
FLOAT32 = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))[None]).logits[0].numpy())
"""

OURS = """
import sys
import numpy as np
from axrun.format.bundle import Bundle
from axrun.model import Model
model = Model.load(Bundle.open(sys.argv[1]), engine=sys.argv[4], threads=2)
np.save(sys.argv[3], np.concatenate([rows.copy() for rows in model.blocks(np.load(sys.argv[2]).tolist())]))
"""

LLAMA = """
import sys
import llama_cpp as L
import numpy as np
ids = np.load(sys.argv[2]).tolist()
L.llama_backend_init()
quiet = L.llama_log_callback(lambda *_: None)
L.llama_log_set(quiet, None)
model = L.llama_model_load_from_file(sys.argv[1].encode(), L.llama_model_default_params())
params = L.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 1024, 512, 512, 2, 2
context = L.llama_init_from_model(model, params)
batch = L.llama_batch_init(len(ids), 0, 1)
batch.n_tokens = len(ids)
for i, token in enumerate(ids):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
    batch.seq_id[i][0] = 0
assert L.llama_decode(context, batch) == 0
shape = (L.llama_vocab_n_tokens(L.llama_model_get_vocab(model)),)
rows = [np.ctypeslib.as_array(L.llama_get_logits_ith(context, i), shape) for i in range(len(ids))]
np.save(sys.argv[3], np.stack(rows))
"""


def divergence(reference: Floats, logits: Floats) -> float:
    """The mean of KL(reference || logits) over the rows."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def ids_of(name: str, width: int = 256) -> Floats:
    if name == "random":
        return np.random.default_rng(0).integers(0, 1000, 64)
    text = (TINY / "heldout.txt").read_text()
    return np.array(Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids[:width])


@pytest.mark.parametrize("hidden", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["tiny-qwen2", "random"])
def test_accuracy_beside_q8_0(
    name: str, hidden: str, checkpoint: Path, llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    source = TINY if name == "tiny-qwen2" else checkpoint
    ids, bundle, gguf = tmp_path / "ids.npy", tmp_path / "bundle", tmp_path / "weights.gguf"
    np.save(ids, ids_of(name))
    command = [sys.executable, "-m", "axc", "llm_build", "--input_path", str(source), "-t", hidden, "-w", "s8"]
    command += ["--output_path", str(bundle), "--kv_cache_len", "1023", "--prefill_len", "128", "--check_level", "-1"]
    subprocess.run([*command, "--post_weight_type", "s8"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    script(sys.executable, FLOAT32, source, ids, tmp_path / "float32.npy")
    reference = np.load(tmp_path / "float32.npy")

    def ours(engine: str) -> Floats:
        script(sys.executable, OURS, bundle, ids, tmp_path / "ours.npy", engine, AXRUN_ENGINE=str(build("native")))
        return np.asarray(np.load(tmp_path / "ours.npy"))

    found = {"ax": divergence(reference, benchmark.pedantic(ours, ("ax",)))}
    found["ax-int8"] = divergence(reference, ours("ax-int8"))
    if llama:
        script(llama, GGUF, source, gguf, "Q8_0")
        script(llama, LLAMA, gguf, ids, tmp_path / "llama.npy")
        found["Q8_0"] = divergence(reference, np.load(tmp_path / "llama.npy"))
    benchmark.extra_info.update(mean_kld=found)
    kinds = ("ax", "ax-int8", "Q8_0")
    cells = [f"{found[who]:.3g}" if who in found else "" for who in kinds]
    title = "Accuracy: mean KLD of s8 on tiny-qwen2 and on random weights"
    record(benchmark, "accuracy-s8", title, ["", *kinds], [[f"{name}, hidden {hidden}", *cells]])
    assert found["ax"] < 1e-3  # random weights come out 6 % above Q8_0, whose scales are finer: 32 columns, not a row
