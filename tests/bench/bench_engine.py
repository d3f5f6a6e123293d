"""The engine compared with onnxruntime and llama.cpp, in shapes of Qwen2-0.5B and SmolLM2-135M on two cores: load,
prefill, decode, and the memory bound; and decode in the shapes of other architectures compared with Qwen2's.

`make bench ARGS='-k engine'`. llama.cpp joins with PEER=llama.cpp, or when LLAMA_PYTHON names a Python that has
llama-cpp-python and gguf. Engines take turns, and the best of the rounds counts: other work on the machine only ever
slows one down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from axc.shapes import config_json
from axc.synth import synth
from tests.bench.tables import record
from tests.engine.conftest import build

ROUNDS = 3
ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--kv_cache_len", "1023", "--prefill_len", "128", "--hidden_state_type", "bf16", "--check_level", "-1"]
CASES = {"s8": "Q8_0", "s4": "Q4_0", "bf16": "BF16", "fp16": "F16"}
SMALL_CASES = {"s8": "Q8_0", "s4": "Q4_0", "s4 in 32": "Q4_0"}  # SmolLM2-135M, whose width is not a multiple of 128
FLOATS = ("bf16", "fp16")
OWN, PEERS = ("ax", "ax-int8"), ("ort", "llama.cpp")
SHAPES = {"qwen2-0.5b": ("Qwen2-0.5B", "qwen2-0.5b"), "smollm-135m": ("SmolLM2-135M", "smollm2-135m")}

# Both print seconds as a JSON object.
OURS = """
import json, sys, time
import numpy as np
from axrun.format.bundle import Bundle
from axrun.model import Model
random = np.random.default_rng(0)
def timed(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
holder = []
load = timed(lambda: holder.append(Model.load(Bundle.open(sys.argv[1]), engine=sys.argv[2], threads=2)))
model = holder[0]
def forward(count):
    model.forward(random.integers(0, 1000, count).tolist())
def prefill(count):
    model.decoder.cache.reset()
    return timed(lambda: forward(count))
prefill(128)
out = {"load": load}
out.update({f"prefill {count}": min(prefill(count) for _ in range(5)) for count in (23, 128)})
model.decoder.cache.reset()
out["decode"] = min(timed(lambda: forward(1)) for _ in range(100))
prefill(256)
out["decode at 256"] = min(timed(lambda: forward(1)) for _ in range(20))
out["prefill 1000"] = prefill(1000)
out["decode at 1000"] = min(timed(lambda: forward(1)) for _ in range(20))
print(json.dumps(out))
"""

LLAMA = """
import json, sys, time
import llama_cpp as L
import numpy as np
random = np.random.default_rng(0)
L.llama_backend_init()
quiet = L.llama_log_callback(lambda *_: None)
L.llama_log_set(quiet, None)
def timed(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
holder = []
open_model = lambda: holder.append(L.llama_model_load_from_file(sys.argv[1].encode(), L.llama_model_default_params()))
load = timed(open_model)
params = L.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 1024, 1024, 512, 2, 2
def forward(context, count):
    tokens = (L.llama_token * count)(*random.integers(0, 1000, count).tolist())
    assert L.llama_decode(context, L.llama_batch_get_one(tokens, count)) == 0
    L.llama_get_logits(context)[0]
def prefill(context, count):
    L.llama_memory_clear(L.llama_get_memory(context), True)
    return timed(lambda: forward(context, count))
def measure(flash_attention):
    params.flash_attn_type = flash_attention
    context = L.llama_init_from_model(holder[0], params)
    prefill(context, 128)
    out = {f"prefill {count}": min(prefill(context, count) for _ in range(5)) for count in (23, 128)}
    L.llama_memory_clear(L.llama_get_memory(context), True)
    out["decode"] = min(timed(lambda: forward(context, 1)) for _ in range(100))
    prefill(context, 256)
    out["decode at 256"] = min(timed(lambda: forward(context, 1)) for _ in range(20))
    out["prefill 1000"] = prefill(context, 1000)
    out["decode at 1000"] = min(timed(lambda: forward(context, 1)) for _ in range(20))
    L.llama_free(context)
    return out
# on is faster in prefill, off behind many tokens: the better of both for each line
with_it, without = measure(L.LLAMA_FLASH_ATTN_TYPE_ENABLED), measure(L.LLAMA_FLASH_ATTN_TYPE_DISABLED)
print(json.dumps({"load": load} | {what: min(with_it[what], without[what]) for what in with_it}))
"""

# Weights in llama.cpp's quantisation; the head has 8 bits, like ours.
GGUF = """
import json, sys
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors import safe_open
source, target, kind = sys.argv[1], sys.argv[2], GGMLQuantizationType[sys.argv[3]]
config = json.load(open(source + "/config.json"))
writer = GGUFWriter(target, config["model_type"])
writer.add_context_length(1024)
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_rope_freq_base(config.get("rope_theta", 1e6))
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_tokenizer_model("no_vocab")
writer.add_vocab_size(config["vocab_size"])
parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
with safe_open(source + "/model.safetensors", framework="numpy") as file:
    for name in file.keys():
        tensor = file.get_tensor(name).astype(np.float32)
        if name not in whole:
            _, _, index, rest = name.split(".", 3)
            part, suffix = rest.rsplit(".", 1)
        renamed = whole.get(name) or f"blk.{index}.{parts[part]}.{suffix}"
        if tensor.ndim == 2:
            used = GGMLQuantizationType.Q8_0 if name in whole else kind
            writer.add_tensor(renamed, quants.quantize(tensor, used), raw_dtype=used)
        else:
            writer.add_tensor(renamed, tensor)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""

# Two threads read the mapped files as fast as they can, half of the bytes each, so that neither reads what the other
# has cached. They start together, and a pass ends with the slower one, because one thread alone reads at more than half
# of the common rate. Prints the bytes per second of the best pass.
READ = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
import numpy as np
PASSES = 30
total = sum(os.path.getsize(path) for path in sys.argv[1:])
halves, begun = ([], []), 0
for path in sys.argv[1:]:
    numbers = np.memmap(path, np.uint64, "r", shape=(os.path.getsize(path) // 8,))
    cut = min(max(total // 2 - begun, 0) // 8, len(numbers))
    halves[0].append(numbers[:cut])
    halves[1].append(numbers[cut:])
    begun += numbers.nbytes
together = Barrier(2)
def read(half):
    best = np.inf
    for _ in range(PASSES):
        together.wait()
        started = time.perf_counter()
        for numbers in half:
            if len(numbers):
                numbers.max()
        together.wait()
        best = min(best, time.perf_counter() - started)
    return best
with ThreadPoolExecutor(2) as pool:
    print(total / max(pool.map(read, halves)))
"""


def script(python: str, text: str, *arguments: object, **environment: str) -> str:
    command = [python, "-c", text, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def bandwidth(bundle: Path) -> float:
    """Bytes per second at which two cores read the weights."""
    return float(script(sys.executable, READ, *sorted(bundle.glob("*.axmodel"))))


# A build in one process whose s4 has blocks of 32 with float16 scales, as Q4_0 has them.
BUILD_IN_32 = """
import sys
from axc.cli import main
from axc.quantizer import WEIGHT_TYPES
from axc.quantizer.round_to_nearest import RoundToNearest
WEIGHT_TYPES["s4"] = RoundToNearest("INT4", 32, "FLOAT16")
sys.exit(main([*sys.argv[1:], "--parallel", "1"]))
"""


# Layers of each, for about as many bytes, more than caches hold: rates then compare. The head is small.
LAYERS = {"qwen2-0.5b": 24, "qwen3-0.6b": 23, "gemma-3-1b": 13}
VOCABULARY = 16384


@pytest.fixture(scope="session")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in the shapes of several architectures, of about as many bytes."""
    folder = tmp_path_factory.mktemp("architectures")
    for name, layers in LAYERS.items():
        synth(name, folder / name, config=config_json(name) | {"num_hidden_layers": layers, "vocab_size": VOCABULARY})
    return {name: folder / name for name in LAYERS}


@pytest.mark.parametrize("weight", CASES)
def test_engine_decodes_every_architecture_as_fast(
    weight: str, architectures: dict[str, Path], benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    """Bytes of weights, keys and values per second: with norms of heads, more norms per layer, windows, GELU."""
    libraries, best = str(build("native")), dict[str, dict[str, float]]()
    for name, checkpoint in architectures.items():
        llm_build(checkpoint, tmp_path / name, weight)

    def round_() -> None:
        for name in architectures:
            seen = json.loads(script(sys.executable, OURS, tmp_path / name, "ax", AXRUN_ENGINE=libraries))
            best[name] = {what: min(best.get(name, seen)[what], seconds) for what, seconds in seen.items()}

    benchmark.pedantic(round_, rounds=ROUNDS)
    read = {
        (name, what): nbytes(tmp_path / name) + kept_nbytes(name, kept)
        for name in architectures
        for what, kept in (("decode", 0), ("decode at 256", 256), ("decode at 1000", 1000))
    }
    benchmark.extra_info.update(best=best, bytes_per_token={" ".join(key): total for key, total in read.items()})
    rows = []
    for name in architectures:
        row = [f"{weight}, {name}"]
        for what in ("decode", "decode at 256", "decode at 1000"):
            rate, usual = (read[one, what] / best[one][what] for one in (name, next(iter(LAYERS))))
            row += [f"{best[name][what] * 1e3:.2f}", f"{rate / 1e9:.1f}", f"{rate / usual:.2f}"]
        rows.append(row)
    units = (" ms", " GB/s", " of Qwen2's")
    columns = ["", *(f"{what}{unit}" for what in ("decode", "at 256", "at 1000") for unit in units)]
    record(benchmark, "engine-architectures", "Engine: decode of other architectures", columns, rows)


def kept_nbytes(name: str, positions: int) -> int:
    """Bytes of keys and values in bfloat16 that a token reads after `positions` others."""
    config = config_json(name)
    heads = config["num_attention_heads"]
    width = int(config["num_key_value_heads"]) * int(config.get("head_dim", config["hidden_size"] // heads))
    return LAYERS[name] * positions * 2 * width * 2


def llm_build(checkpoint: Path, bundle: Path, weight: str) -> None:
    builder = ["-c", BUILD_IN_32] if weight.endswith("32") else ["-m", "axc"]
    command = [sys.executable, *builder, "llm_build", "--input_path", str(checkpoint), "--output_path", str(bundle)]
    types = ["-w", weight.split()[0], "--quantizer", "rtn", "--post_weight_type", "s8"]
    subprocess.run([*command, *FLAGS, *types], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def nbytes(bundle: Path) -> int:
    """Bytes of a bundle that a token reads."""
    return sum(file.stat().st_size for file in bundle.glob("*.axmodel"))


@pytest.mark.parametrize("weight", CASES)
def test_engine_beside_others(
    weight: str, checkpoint: Path, llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    measure(weight, CASES[weight], checkpoint, llama, benchmark, tmp_path)


@pytest.mark.parametrize("weight", SMALL_CASES)
def test_engine_beside_others_on_a_small_model(
    weight: str, small: Path, llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    measure(weight, SMALL_CASES[weight], small, llama, benchmark, tmp_path)


def measure(
    weight: str, peer: str, checkpoint: Path, llama: str | None, benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    """Builds both files, measures every engine in turns and prints the table. `peer`: llama.cpp's type."""
    bundle, gguf = tmp_path / "bundle", tmp_path / "weights.gguf"
    llm_build(checkpoint, bundle, weight)
    libraries = str(build("native"))
    rivals: dict[str, Any] = {
        "ax": lambda: script(sys.executable, OURS, bundle, "ax", AXRUN_ENGINE=libraries),
        "ax-int8": lambda: script(sys.executable, OURS, bundle, "ax-int8", AXRUN_ENGINE=libraries),
        "ort": lambda: script(sys.executable, OURS, bundle, "ort"),
    }
    if weight in FLOATS:  # no activations are rounded to 8 bits there
        del rivals["ax-int8"]
    if llama:
        script(llama, GGUF, checkpoint, gguf, peer)
        rivals["llama.cpp"] = lambda: script(llama, LLAMA, gguf)
    best: dict[str, dict[str, float]] = {name: {} for name in rivals}
    reads: list[float] = []

    def round_() -> None:
        reads.append(bandwidth(bundle))
        for name, rival in rivals.items():
            for what, seconds in json.loads(rival()).items():
                best[name][what] = min(best[name].get(what, seconds), seconds)

    benchmark.pedantic(round_, rounds=ROUNDS)
    weights = nbytes(bundle)
    bound = weights / max(reads)
    benchmark.extra_info.update(best=best, bytes_per_second=max(reads), bytes_per_token=weights)
    own = [name for name in rivals if name in OWN]
    peers = [name for name in rivals if name not in own]
    rows = [
        [
            f"{weight}, {what}",
            *(f"{best[name][what] * 1e3:.1f}" if name in best else "" for name in (*OWN, *PEERS)),
            *(f"{best[name][what] / best['ax'][what]:.2f}x" if name in best else "" for name in PEERS),
        ]
        for what in best["ax"]
    ]
    model, key = SHAPES.get(checkpoint.name, (checkpoint.name, "other"))
    headlines = []
    if weight in ("s8", "s4", "s4 in 32") and "llama.cpp" in peers:
        for what in ("decode", "prefill 128"):
            ours, theirs = best["ax"][what], best["llama.cpp"][what]
            line = f"{what}, {model} {weight}", f"{ours * 1e3:.1f} ms", f"llama.cpp {peer} {theirs * 1e3:.1f} ms"
            headlines.append((*line, f"{theirs / ours:.2f}x as fast"))
    record(
        benchmark,
        f"engine-{key}",
        f"Engine: {model} shapes, two cores, ms",
        ["", *OWN, *PEERS, *(f"{name} / ax" for name in PEERS)],
        rows,
        unit="ms",
        note="Decode: one token at position 0, 256 or 1000. Prefill: 23, 128 or 1000 tokens. ax-int8 rounds "
        "activations to 8 bits. llama.cpp: with or without flash attention, whichever is faster in a line.",
        bars=("ax", "llama.cpp"),
        headlines=headlines,
    )
    shares = ", ".join(f"{bound / best[ours]['decode']:.0%} of the bound ({ours})" for ours in own)
    print(f"{weights / 1e6:.0f} MB a token at {max(reads) / 1e9:.1f} GB/s: decode reaches {shares}")
