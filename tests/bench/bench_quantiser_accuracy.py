"""What 4, 5.5 and 8 bits leave of a real model: our quantisers beside llama.cpp's types, in one run.

`make bench ARGS='-k quantiser' PEER=llama.cpp BENCH_TEXT=faq.txt`: BENCH_TEXT is the UTF-8 text to measure on, such as
that of Debian's package debian-faq. The model is SmolLM2-135M-Instruct, its channels in another order
(tests.bench.real_model); the reference transformers in float32. llama.cpp stores embedding and head in Q8_0, ours are
bfloat16 and s8: a scale per row, calibrated one per 64. Bits are those of a layer weight.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Tokenizer

from axc import fetch
from axc.models import load_model
from axrun.measure.evaluate import log_softmax
from tests.bench import real_model
from tests.bench.bench_engine import ROOT, script
from tests.bench.bench_engine_accuracy import FLOAT32, LLAMA, OURS
from tests.bench.tables import record
from tests.engine.conftest import build

MODEL = "smollm2-135m"
WINDOWS, WIDTH = 6, 512
BESIDE = {"s8 gptq": "Q8_0", "s4 gptq": "IQ4_NL", "5.5 gptq": "Q4_K_M"}  # lines of the README
LLAMA_TYPES = ("Q8_0", "Q4_K_M", "IQ4_NL", "Q4_0")
# flags of axc llm_build, and the bits of a layer weight where no calibration says them
OURS_TYPES = {
    "s8": ("-w s8", 8.0),
    "s8 gptq": ("-w s8 --quantizer gptq", 0.0),
    "s4 rtn": ("-w s4 --quantizer rtn", 4.5),
    "s4 gptq": ("-w s4 --quantizer gptq", 0.0),
    "5.5 gptq": ("-w s4 --bits 5.5", 0.0),
}

QUANTISE = """
import sys
import llama_cpp as L
L.llama_backend_init()
quiet = L.llama_log_callback(lambda *_: None)
L.llama_log_set(quiet, None)
params = L.llama_model_quantize_default_params()
params.ftype = getattr(L, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
params.token_embedding_type = params.output_tensor_type = L.GGML_TYPE_Q8_0
params.nthread = 2
assert L.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params) == 0
"""

Floats = NDArray[Any]


def test_quantisers_beside_llama_cpp(llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    text = os.environ.get("BENCH_TEXT")
    if not text:
        pytest.skip("BENCH_TEXT names no text to measure on")
    source = fetch.fetch(load_model(MODEL))
    folder = real_model.permuted(source, tmp_path / "model")
    ids = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(Path(text).read_text(), add_special_tokens=False).ids
    )
    windows = []
    for index in range(WINDOWS):
        windows.append(tmp_path / f"ids{index}.npy")
        np.save(windows[-1], np.array(ids[index * WIDTH : (index + 1) * WIDTH]))

    def logits(python: str, program: str, model: Path, *more: str, **environment: str) -> list[Floats]:
        out = tmp_path / "logits.npy"
        found = []
        for window in windows:
            script(python, program, model, window, out, *more, **environment)
            found.append(log_softmax(np.load(out)))
        return found

    exact = logits(sys.executable, FLOAT32, folder)

    def row(name: str, bits: float, found: list[Floats]) -> dict[str, float]:
        pairs = list(zip(exact, found, strict=True))
        kld = float(np.mean([(np.exp(p) * (p - q)).sum(axis=1).mean() for p, q in pairs]))
        top = float(np.mean([(p.argmax(axis=1) == q.argmax(axis=1)).mean() for p, q in pairs]))
        chosen = [q[np.arange(WIDTH - 1), np.load(ids)[1:]] for q, ids in zip(found, windows, strict=True)]
        perplexity = float(np.exp(-np.mean(chosen)))
        print(name, f"{bits:.2f} bits, mean KLD {kld:.4f}", flush=True)
        return {"bits": bits, "kld": kld, "top": top, "perplexity": perplexity}

    def ours(bundle: Path) -> list[Floats]:
        return logits(sys.executable, OURS, bundle, "ax", AXRUN_ENGINE=str(build("native")))

    table = {"float32": row("float32", 32, exact)}
    for name, (flags, bits) in OURS_TYPES.items():
        bundle = tmp_path / name
        command = [sys.executable, "-m", "axc", "llm_build", "--input_path", str(folder), "--output_path", str(bundle)]
        command += ["--kv_cache_len", "1023", "--prefill_len", "128", "-t", "fp32", "-c", "-1", *flags.split()]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        found = benchmark.pedantic(ours, (bundle,)) if name == "s8" else ours(bundle)
        table[name] = row(name, bits or _bits(bundle), found)
    if llama:
        whole = real_model.as_gguf(folder, tmp_path / "float32.gguf")
        for name in LLAMA_TYPES:
            path = tmp_path / f"{name}.gguf"
            script(llama, QUANTISE, whole, path, name)
            table[name] = row(name, _gguf_bits(path), logits(llama, LLAMA, path))
    benchmark.extra_info.update(found=table)
    rows = [
        (name, f"{seen['bits']:.2f}", f"{seen['kld']:.4f}", f"{seen['top']:.1%}", f"{seen['perplexity']:.3f}")
        for name, seen in table.items()
    ]
    headlines = [
        (
            f"mean KLD, SmolLM2-135M {ours}",
            _said(table[ours]),
            f"llama.cpp {theirs} {_said(table[theirs])}",
            _less(table, ours, theirs),
        )
        for ours, theirs in BESIDE.items()
        if theirs in table
    ]
    record(
        benchmark,
        "quality",
        f"Quality: SmolLM2-135M-Instruct with its channels in another order, {WINDOWS} x {WIDTH} tokens",
        ("", "bits a layer weight", "mean KLD", "same top token", "perplexity"),
        rows,
        note=f"Text: {Path(text).name} (BENCH_TEXT). Embedding and head: llama.cpp Q8_0, ours bfloat16 and s8 "
        "(rtn: a scale per row, gptq: blocks of 64).",
        bars=("mean KLD",),
        headlines=headlines,
    )
    assert table["s4 gptq"]["kld"] < 0.5 * table["s4 rtn"]["kld"]


def _said(seen: dict[str, float]) -> str:
    return f"{seen['kld']:.4f} at {seen['bits']:.2f} bits"


def _less(table: dict[str, dict[str, float]], ours: str, theirs: str) -> str:
    return f"{table[ours]['kld'] / table[theirs]['kld']:.2f} of it"


def _bits(bundle: Path) -> float:
    return float(json.loads((bundle / "manifest.json").read_text())["calibration"]["bits"])


def _gguf_bits(path: Path) -> float:
    """Of a layer weight."""
    tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if "blk" in tensor.name and len(tensor.shape) == 2]
    return float(sum(8 * tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors))
