"""Fixtures of the runner tests: loaded bundles, the same checkpoint in transformers, a text for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from axrun.format.axmodel import OPSET, PRODUCER, Axmodel, Node, Tensor, TensorInfo, encode
from axrun.format.bundle import Bundle
from axrun.format.dtypes import nbytes
from axrun.model import Model
from axrun.session import ENGINES

METADATA = {"axmodel.version": "1", "axmodel.kind": "post", "axmodel.groups": '[{"tokens":1,"history":0}]'}
LinearFile = Callable[..., Path]


@pytest.fixture(scope="session", params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine; tests that load a model with a fixture run on all of them."""
    return str(request.param)


@pytest.fixture(scope="session")
def _loaded_fp32(bundle_fp32: Path, engine: str) -> Model:
    return Model.load(Bundle.open(bundle_fp32), engine)


@pytest.fixture(scope="session")
def _loaded_s8(bundle_s8: Path, engine: str) -> Model:
    return Model.load(Bundle.open(bundle_s8), engine)


@pytest.fixture
def model_fp32(_loaded_fp32: Model) -> Model:
    """float32 throughout, with an empty cache."""
    _loaded_fp32.decoder.cache.reset()
    return _loaded_fp32


@pytest.fixture
def model_s8(_loaded_s8: Model) -> Model:
    """s8 weights, bfloat16 hidden state, with an empty cache."""
    _loaded_s8.decoder.cache.reset()
    return _loaded_s8


@pytest.fixture(scope="session")
def reference(tiny_qwen2: Path) -> Any:
    """The same checkpoint in transformers, float32."""
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def hf_tokenizer(tiny_qwen2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_qwen2)


@pytest.fixture(scope="session")
def heldout(tiny_qwen2: Path, hf_tokenizer: Any) -> list[int]:
    """255 token ids (the whole context) of a text the model was not trained on."""
    return list(hf_tokenizer(tiny_qwen2.joinpath("heldout.txt").read_text())["input_ids"][:255])


@pytest.fixture(scope="session")
def heldout_logits(reference: Any, heldout: list[int]) -> NDArray[np.float32]:
    """transformers' logits [n, vocab] after every token of `heldout`."""
    with torch.inference_mode():
        return np.asarray(reference(torch.tensor([heldout])).logits[0].numpy())


@pytest.fixture
def linear_file(tmp_path: Path) -> LinearFile:
    """Writes an axmodel with one linear layer: input [1, M, in] -> output [1, M, out], both float32.

    `parts` are the tensors of the weight, (dtype, dims, data); the first is the matrix.
    """

    def write(parts: list[tuple[str, tuple[int, ...], NDArray[Any]]], **attributes: int) -> Path:
        tensors = {}
        for number, (dtype, dims, data) in enumerate(parts):
            name = f"weight.{number}"
            raw = memoryview(np.ascontiguousarray(data).tobytes())
            tensors[name] = Tensor(name, dtype, dims, -1, nbytes(dtype, dims), raw)
        rows, columns = parts[0][1]
        matrix = "weight.0"
        nodes = []
        if len(parts) > 1:
            names = list(tensors)
            if parts[1][0] == "FLOAT16":
                nodes.append(Node("Cast", (names[1],), ("scales",), {"to": 1}))
                names[1] = "scales"
            nodes.append(Node("DequantizeLinear", tuple(names), ("wide",), attributes))
            matrix = "wide"
        elif parts[0][0] != "FLOAT":
            nodes.append(Node("Cast", ("weight.0",), ("wide",), {"to": 1}))
            matrix = "wide"
        nodes.append(Node("Transpose", (matrix,), ("transposed",), {"perm": (1, 0)}))
        nodes.append(Node("MatMul", ("input", "transposed"), ("output",)))
        model = Axmodel(
            producer_name=PRODUCER,
            producer_version="test",
            opset=OPSET,
            metadata=METADATA,
            inputs=(TensorInfo("input", "FLOAT", (1, "M", columns)),),
            outputs=(TensorInfo("output", "FLOAT", (1, "M", rows)),),
            nodes=tuple(nodes),
            initializers=tensors,
            name="linear",
        )
        path = tmp_path / "linear.axmodel"
        path.write_bytes(encode(model))
        return path

    return write
