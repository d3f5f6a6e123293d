"""What a token becomes depends on its tokens alone: the same bits for any cut, place, padding, history and number of
threads; with integer weights on every instruction set too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axc import build
from axc.synth import synth
from axrun.format.dtypes import FLOATS as FLOAT_TYPES
from axrun.format.dtypes import from_float32
from tests.engine.conftest import Run
from tests.engine.test_numerics import HERE, grouped, linear_file

CUTS = 3  # of each bundle, number of threads and instruction set
INTEGERS, FLOATS = ("s8", "s4"), ("bf16", "fp16", "fp32", "fp8_e4m3")

# Widths that fill no vector and no block; windows, a soft cap, Gelu, norms of heads.
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": 200,
    "intermediate_size": 328,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "vocab_size": 333,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 24,
    "query_pre_attn_scalar": 40,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 20.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 384,
    "intermediate_size": 576,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 333,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def bundles(build_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Bundles by the type of their weights."""
    made: dict[str, list[Path]] = {}
    folder = tmp_path_factory.mktemp("one-answer")
    for name, config in (("gemma2", GEMMA2), ("qwen3", QWEN3)):
        synth(name, folder / name, config=config)
    for weight in (*INTEGERS, *FLOATS):
        options: dict[str, Any] = {"weight_type": weight, "post_weight_type": "s8" if weight == "s4" else weight}
        made[weight] = [build_tiny(hidden_state_type="fp32" if weight == "fp32" else "bf16", **options)]
        for name in ("gemma2", "qwen3"):
            if weight == "fp8_e4m3" or (name == "gemma2" and weight == "s4"):  # blocks do not divide its rows
                continue
            out = folder / f"{name}-{weight}"
            sizes = {
                "prefill_len": 32,
                "kv_cache_len": 255,
                "last_kv_cache_len": (32, 128),
                "hidden_state_type": "fp16",
            }
            build.build(build.plan(build.Options(folder / name, out, **{**sizes, **options})))
            made[weight].append(out)
    return made


def digests(in_process: Run, paths: list[Path], cuts: int, seed: int, **environment: str) -> dict[str, list[str]]:
    done = in_process("one_answer.py", cuts, seed, *paths, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    isa, *lines = done.stdout.splitlines()
    assert isa == environment["AXC_ISA"]
    assert len(lines) == cuts * len(paths)
    return {str(path): [line.split(" ", 1)[1] for line in lines if line.startswith(f"{path} ")] for path in paths}


@pytest.fixture(scope="session")
def one_by_one(bundles: dict[str, list[Path]], in_process: Run) -> dict[str, list[str]]:
    """Of integer weights, a token at a time on one thread."""
    paths = [path for weight in INTEGERS for path in bundles[weight]]
    return digests(in_process, paths, 1, 0, AXC_ISA=HERE[-1], AXC_THREADS="1")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", HERE)
def test_integer_weights_have_one_answer_everywhere(
    isa: str, threads: int, bundles: dict[str, list[Path]], one_by_one: dict[str, list[str]], in_process: Run
) -> None:
    paths = [path for weight in INTEGERS for path in bundles[weight]]
    seed = 10 * HERE.index(isa) + threads
    seen = digests(in_process, paths, CUTS, seed, AXC_ISA=isa, AXC_THREADS=str(threads))
    for path, lines in seen.items():
        assert set(lines) == set(one_by_one[path]), (path, seed)


@pytest.mark.parametrize("isa", HERE)
def test_floats_have_one_answer_on_an_instruction_set(
    isa: str, bundles: dict[str, list[Path]], in_process: Run
) -> None:
    paths = [path for weight in FLOATS for path in bundles[weight]]
    alone = digests(in_process, paths, 2, 1, AXC_ISA=isa, AXC_THREADS="1")
    several = digests(in_process, paths, CUTS, 2, AXC_ISA=isa, AXC_THREADS="2")
    for path in alone:
        assert len({*alone[path], *several[path]}) == 1, path


# rows, columns and block of single matrices; block 0: one scale per row
SHAPES = (
    *((37, 384, 128), (33, 576, 32), (3, 2304, 32), (9, 576, 64), (17, 64, 64)),
    *((33, 192, 96), (8, 512, 256), (7, 36, 0), (6, 130, 0)),
)


@pytest.fixture(scope="session")
def linears(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Single matrices: integers with and without zero points, and floats."""
    folder, random = tmp_path_factory.mktemp("linears"), np.random.default_rng(0)
    integers = grouped(folder, "FLOAT", False, SHAPES) + grouped(folder, "FLOAT16", True, SHAPES)
    floats = []
    for weight in ("fp32", "fp16", "bf16"):
        for shape in ((37, 130), (33, 575), (70, 640)):
            data = from_float32(random.standard_normal(shape, np.float32), FLOAT_TYPES[weight])
            floats.append(linear_file(folder, [(FLOAT_TYPES[weight], shape, data)], {}))
    return {"integers": integers, "floats": floats}


def rows_of(in_process: Run, isa: str, paths: list[Path]) -> dict[tuple[str, str], str]:
    """The digest of each matrix's single rows in each precision. Fails if a row beside others has other bits."""
    done = in_process("one_linear.py", *paths, AXC_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]
    seen, *lines = done.stdout.splitlines()
    assert seen == isa
    assert len(lines) == 2 * len(paths)
    found = {}
    for line in lines:
        path, bits, digest, *odd = line.split()
        assert not odd, line
        found[path, bits] = digest
    return found


@pytest.fixture(scope="session")
def single_rows(linears: dict[str, list[Path]], in_process: Run) -> dict[tuple[str, str], str]:
    return rows_of(in_process, HERE[-1], linears["integers"])


@pytest.mark.parametrize("isa", HERE)
def test_a_row_has_the_same_bits_beside_any_number_of_others(
    isa: str, linears: dict[str, list[Path]], single_rows: dict[tuple[str, str], str], in_process: Run
) -> None:
    """And on every instruction set, if the weights are integers."""
    found = rows_of(in_process, isa, [*linears["integers"], *linears["floats"]])
    assert found.items() >= single_rows.items()
