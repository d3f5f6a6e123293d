"""What the tests pack, beside what AutoRound, compressed-tensors and transformers pack and unpack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from axc.checkpoints import Checkpoint
from tests.axc import quantised_files
from tests.axc.as_transformers import AUTO
from tests.axc.quantised_files import FORMS, Drawn, Form

OUT, IN = 64, 256


def drawn(form: Form) -> Drawn:
    return quantised_files.draw(OUT, IN, form, np.random.default_rng(3))


def linear(values: Any) -> nn.Linear:
    made = nn.Linear(IN, OUT, bias=False)
    made.weight.data = torch.from_numpy(np.array(values))
    return made


def expect_same(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    for name, tensor in ours.items():
        assert torch.equal(theirs[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_as_autoround_packs_it(bits: int, symmetric: bool, less_one: bool) -> None:
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    source = drawn(Form("gptq", bits=bits, symmetric=symmetric))
    source.zeros[:] = np.maximum(source.zeros, less_one)  # theirs has no zero point 0 less 1
    made = (qlinear_torch_zp if less_one else qlinear_torch).QuantLinear(bits, 32, IN, OUT, False, g_idx=True)
    made.device = "cpu"
    zeros = 1 << (bits - 1) if symmetric else torch.from_numpy(source.zeros.astype(np.float32))
    made.pack(linear(source.values), source.scales.float(), zeros, None, "cpu")
    expect_same(dict(made.named_buffers()), quantised_files.gptq(source, bits, less_one))


def test_awq_as_autoround_packs_it() -> None:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm

    source = drawn(Form("awq", symmetric=False))
    scales, zeros = source.scales.float().T.contiguous(), torch.from_numpy(source.zeros.T.copy())
    made = WQLinear_GEMM.from_linear(linear(source.values), 4, 32, False, scales, zeros)
    ours = quantised_files.awq(source)
    expect_same(dict(made.named_buffers()), ours)
    values = dequantize_gemm(ours["qweight"], ours["qzeros"], ours["scales"].float(), 4, 32)
    assert np.array_equal(values.T.numpy(), source.values)


INTEGERS = ("pack-quantized", "int-quantized")
PACKED = [name for name, form in FORMS.items() if form.kind in INTEGERS and not form.index and not form.down]


@pytest.mark.parametrize("name", PACKED)
def test_integers_as_compressed_tensors_packs_them(name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form = FORMS[name]
    source, half = drawn(form), 1 << (form.bits - 1)
    scheme = QuantizationScheme(**quantised_files.config(form)["config_groups"]["group_0"])
    compressor: Any = BaseCompressor.get_value_from_registry(form.kind)
    shape = (1,) if form.one else source.scales.shape
    scales = source.scales.float().reshape(shape)  # theirs divides in the scales' own type
    given = {"weight": torch.from_numpy(source.values), "weight_scale": scales}
    if not form.symmetric:
        given["weight_zero_point"] = torch.from_numpy((source.zeros - half).astype(np.int8)).reshape(shape)
    ours = {**quantised_files.compressed(source, form), "weight_scale": scales}
    theirs = compressor.compress(given, scheme)
    assert theirs.keys() == ours.keys()
    expect_same(theirs, ours)
    assert np.array_equal(compressor.decompress(ours, scheme)["weight"].numpy(), source.values)


@pytest.mark.parametrize(
    "name", ["fp8-blocks", "ct-fp8", "ct-fp8-blocks", "ct-int4-bf16", "ct-int4-asymmetric", "ct-int8"]
)
def test_a_folder_as_transformers_dequantises_it(tmp_path: Path, name: str) -> None:
    """compressed-tensors multiplies in the type of the scales, which rounds the product once more."""
    form = FORMS[name]
    quantised_files.write(tmp_path / "folder", form)
    how: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    if form.method == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    theirs, ours = AUTO.from_pretrained(tmp_path / "folder", **how), Checkpoint.open(tmp_path / "folder")
    packed = [tensor for tensor, stored in ours.tensors.items() if stored.packed]
    assert len(packed) == 14
    for tensor in packed:
        wanted = theirs.get_parameter(tensor).detach()
        values = torch.from_numpy(ours.rows(tensor, 0, len(wanted)))
        assert torch.equal(values.to(form.scales).float(), wanted.float()), tensor
