"""GGUF files: our reader compared with the gguf package and transformers, and lossless storage of levels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import transformers
from gguf import GGMLQuantizationType as Kind
from onnx import numpy_helper
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from axc import build, hf_folder
from axc.checkpoints import EMBEDDING, Checkpoint, widen
from axc.checkpoints.gguf.rows import PACKINGS
from axc.families import FAMILIES
from axc.reference import Reference
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.model import Model
from axrun.text.hf_files import template_source
from tests.axc import gguf_files
from tests.axc.as_transformers import AUTO, FP32, IDS, logits_of, same
from tests.axc.axc import assert_done, axc, llm_build

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# every type that the package dequantises, except most of IQ1 to IQ3, which we treat alike
KINDS = ("F32", "F16", "BF16", "Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "TQ1_0", "TQ2_0", *PACKINGS)
KINDS += ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4")
Made = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A file of an architecture and a type, made once; its embedding is exact in bfloat16, like a bundle's."""
    folder, known = tmp_path_factory.mktemp("gguf"), dict[tuple[str, str], Path]()

    def make(architecture: str, kind: str) -> Path:
        if (architecture, kind) not in known:
            path = folder / f"{architecture}-{kind}.gguf"
            known[architecture, kind] = gguf_files.write(path, architecture, Kind[kind], head=Kind.BF16)
        return known[architecture, kind]

    return make


def plan(path: Path, output: Path, **options: Any) -> build.Plan:
    return build.plan(build.Options(path, output, **{"prefill_len": 16, "kv_cache_len": 63, **FP32, **options}))


def logits(path: Path, output: Path, **options: Any) -> Any:
    build.build(plan(path, output, **options))
    return Model.load(Bundle.open(output)).forward(IDS.tolist(), 0, logits="all")


# Reading


@pytest.mark.parametrize(
    ("architecture", "kind"), [("qwen2", "Q8_0"), ("qwen3", "Q8_0"), *(("llama", kind) for kind in KINDS)]
)
def test_every_tensor_matches_transformers(made: Made, architecture: str, kind: str) -> None:
    path = made(architecture, kind)
    ours, skeleton = Checkpoint.open(path), gguf_files.model(architecture)
    read: Any = load_gguf_checkpoint
    tensors = read(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    assert set(ours.tensors) == set(tensors) == set(skeleton.state_dict())
    for name, stored in ours.tensors.items():
        expected = tensors[name].float().numpy()
        assert stored.shape == expected.shape
        for start, block in ours.blocks(name):
            values = widen(block, stored.dtype)
            assert np.array_equal(values.view(np.uint32), expected[start : start + len(block)].view(np.uint32))


@pytest.mark.parametrize(
    ("architecture", "changes", "alignment"),
    [*((architecture, {}, None) for architecture in ARCHITECTURES), ("llama", {"attention_bias": True}, 4096)],
)
def test_float_files_match_the_original_model(
    tmp_path: Path, architecture: str, changes: dict[str, Any], alignment: int | None
) -> None:
    """q and k are in transformers' order, although the file has llama.cpp's permutation, of their biases too."""
    path = gguf_files.write(tmp_path / "model.gguf", architecture, changes=changes, alignment=alignment)
    model = gguf_files.model(architecture, changes)
    ours = Checkpoint.open(path)
    for name, parameter in model.state_dict().items():
        assert np.array_equal(ours.rows(name, 0, len(parameter)), parameter.numpy()), name
        middle = parameter.shape[0] // 3
        assert np.array_equal(ours.rows(name, middle, middle + 5), parameter.numpy()[middle : middle + 5]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_K"])
def test_logits_match_transformers(made: Made, tmp_path: Path, architecture: str, kind: str) -> None:
    path = made(architecture, kind)
    theirs = Reference(path).logits(IDS)
    assert same(logits(path, tmp_path / "out"), theirs)


def test_each_architecture_is_of_one_family() -> None:
    names = [family.gguf.name for family in FAMILIES.values() if family.gguf]
    assert sorted(names) == sorted(ARCHITECTURES)


def test_a_tied_head(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", "qwen2", head=Kind.Q8_0, changes={"tie_word_embeddings": True})
    planned = plan(path, tmp_path / "out", post_weight_type=None)
    assert planned.config.tie_word_embeddings
    assert planned.target.post_weight_type == "s8"
    assert set(planned.kept) == {EMBEDDING}


def test_the_frequencies_of_llama_3(tmp_path: Path) -> None:
    """transformers does not read them from a GGUF, so the original model is the reference."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    changes = {"rope_scaling": {"rope_type": "llama3", "rope_theta": 10000.0, **scaling}}
    model = gguf_files.model("llama", changes)
    plain = gguf_files.model("llama").model.rotary_emb.inv_freq
    divisors = (plain / model.model.rotary_emb.inv_freq).float().numpy()
    assert divisors.max() > 1.5
    path = gguf_files.write(tmp_path / "model.gguf", changes=changes, rope=divisors)
    assert same(logits(path, tmp_path / "out"), logits_of(model))
    reference = Reference(path)
    assert same(reference.logits(IDS), logits_of(model))
    assert "rope_scaling" in reference.remarks[0]
    odd = gguf_files.write(tmp_path / "odd.gguf", rope=divisors + np.float32(0.25))
    with pytest.raises(BadInput, match=r"not those of Llama 3"):
        Checkpoint.open(odd)
    both = gguf_files.write(tmp_path / "both.gguf", rope=divisors, keys={"llama.rope.scaling.factor": 4.0})
    with pytest.raises(BadInput, match=r"llama\.rope\.scaling\.factor is .*4\.0.* beside rope_freqs\.weight"):
        Checkpoint.open(both)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"type": "linear", "factor": 4.0}, 4.0),
        ({"factor": 4.0}, 4.0),  # without a type: linear
        ({"factor": 0.0}, None),
        ({"type": "none", "factor": 4.0}, None),
    ],
)
@pytest.mark.parametrize("divisors", [False, True])
def test_scaled_frequencies(tmp_path: Path, keys: dict[str, Any], factor: float | None, divisors: bool) -> None:
    """`llama_model::load_hparams` of llama.cpp; divisors of 1 change nothing."""
    changes = {"rope_scaling": {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}} if factor else {}
    named = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    ones = np.ones(16, np.float32) if divisors else None
    path = gguf_files.write(tmp_path / "model.gguf", rope=ones, keys=named)
    expected = logits_of(gguf_files.model("llama", changes))
    assert same(logits(path, tmp_path / "out"), expected)
    assert same(Reference(path).logits(IDS), expected)
    assert same(expected, logits_of(gguf_files.model("llama"))) == (factor is None)


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-2", "spm"])
def test_the_tokenizer_matches_transformers(tmp_path: Path, pre: str) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", pre=pre)
    checkpoint = Checkpoint.open(path)
    found = hf_folder.write(checkpoint.folder, tmp_path / "hf", 512, None, path)
    assert found.compared
    assert not found.mended
    assert set(found.stop_ids) == {2}
    assert found.tokenizer is not None
    assert found.tokenizer.decode(found.tokenizer.encode(gguf_files.WORDS)) == gguf_files.WORDS
    assert bool(found.remarks) == (pre == "smollm")  # which transformers does not know


@pytest.mark.parametrize(
    ("default", "said"), [(True, "the default one is used, not rag, tool_use"), (False, "exist, but no default")]
)
def test_templates_for_a_purpose(tmp_path: Path, default: bool, said: str) -> None:
    keys = {f"tokenizer.chat_template.{name}": "{{ messages }}" for name in ("tool_use", "rag")}
    path = gguf_files.write(tmp_path / "model.gguf", "qwen2", keys=keys)
    if not default:  # the same length, so that the file stays whole
        path.write_bytes(path.read_bytes().replace(b"tokenizer.chat_template\x08", b"general.other_template_\x08", 1))
    (line,) = plan(path, tmp_path / "out").notices
    assert line.startswith("chat template: ")
    assert said in line
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert theirs.chat_template == (gguf_files.TEMPLATE if default else None)
    assert template_source(Checkpoint.open(path).folder) == theirs.chat_template


def test_the_temporary_folder_is_removed_with_the_checkpoint(made: Made) -> None:
    checkpoint = Checkpoint.open(made("llama", "F32"))
    folder = checkpoint.folder
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    theirs = AUTO.from_config(Reference(checkpoint.path).config)
    assert checkpoint.gguf is not None
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):
        assert checkpoint.gguf.config[key] == getattr(theirs.config, key)
    del checkpoint
    assert not folder.exists()


# Lossless storage


@pytest.mark.parametrize("kind", sorted(PACKINGS))
def test_quantised_values_and_scales_are_kept_exactly(made: Made, tmp_path: Path, kind: str) -> None:
    """Compares ONNX's DequantizeLinear of the axmodel with the gguf package's dequantisation of the file."""
    path, output = made("qwen2", kind), tmp_path / "out"
    planned = plan(path, output, weight_type=None)
    manifest = build.build(planned).manifest
    assert len(planned.kept) == 14
    assert set(manifest["accuracy"]["kept"].values()) == {kind}
    assert manifest["accuracy"]["weight_error"] == {}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    model = onnx.load(output / "qwen2_p16_l1_together.axmodel")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    blocks = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for ours, name in (("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q")):
        weight = f"model.layers.1.{ours}.weight"
        levels = numpy_helper.to_array(stored[weight]).astype(np.float32)
        scales = numpy_helper.to_array(stored[weight + "_scale"])
        size = {field.name: field.i for field in blocks[weight].attribute}["block_size"]
        values = levels * np.repeat(scales, size, axis=1)
        entry = tensors[f"blk.1.{name}.weight"]
        expected = gguf.quants.dequantize(entry.data, entry.tensor_type).reshape(values.shape)
        assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))
    if kind in ("Q8_0", "Q4_0"):  # what the engine computes from them differs by its rounding of activations to 16 bits
        seen, exact = logits(path, tmp_path / "again", weight_type=None), logits(path, tmp_path / "fp32")
        assert np.abs(seen - exact).max() < 2e-3 * np.abs(exact).max()


def test_the_stored_type_is_the_default(made: Made, tmp_path: Path) -> None:
    chosen = {kind: plan(made("qwen2", kind), tmp_path, weight_type=None).target.weight_type for kind in PACKINGS}
    assert {kind for kind, weight_type in chosen.items() if weight_type == "s4"} == {"Q4_0", "Q3_K"}
    assert plan(made("qwen2", "F16"), tmp_path, weight_type=None).target.weight_type == "s8"


def test_types_without_a_lossless_match_need_an_explicit_weight_type(made: Made, tmp_path: Path) -> None:
    path = made("llama", "Q4_1")
    with pytest.raises(BadInput, match=r"blk\.0\.\w+\.weight is stored as Q4_1, which .*\n.*--weight_type s8"):
        plan(path, tmp_path / "out", weight_type=None)
    planned = plan(path, tmp_path / "out", weight_type="s8")
    assert planned.notices == ("14 matrices stored as Q4_1 dequantised, and stored again as s8: not exact",)
    manifest = build.build(planned).manifest
    assert 0 < manifest["accuracy"]["worst_weight_error"] < 0.02
    assert "kept" not in manifest["accuracy"]
    (note,) = plan(made("llama", "Q8_0"), tmp_path / "out", weight_type="s4").notices
    again = "stored again as s4, rounded to nearest and not calibrated: not exact"
    assert note == f"14 matrices stored as Q8_0 dequantised, and {again}"


def test_a_value_that_llama_cpp_does_not_write(made: Made, tmp_path: Path) -> None:
    data = bytearray(made("llama", "Q8_0").read_bytes())
    entry = next(t for t in gguf.GGUFReader(made("llama", "Q8_0")).tensors if t.name == "blk.0.ffn_up.weight")
    data[entry.data_offset + 2] = 0x80
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"blk\.0\.ffn_up\.weight holds level -128"):
        build.build(plan(path, tmp_path / "out", weight_type=None))


# The commands


def test_build_check_and_doctor(made: Made, tmp_path: Path) -> None:
    path, output = made("llama", "Q8_0"), tmp_path / "out"
    built = llm_build(path, output, "--prefill_len", 16, "--kv_cache_len", 63, "--check_level", 2)
    assert_done(built)
    assert "14 matrices stored as Q8_0 kept as s8: the same levels and scales" in built.out
    examined = axc("doctor", output, "--checkpoint", path)
    assert examined.code == 0, examined
    assert "healthy: all 10 stages agree" in examined.out
    options = build.Options(path, output, prefill_len=16, kv_cache_len=63)
    assert not build.build(build.plan(options)).fresh


def test_the_bytes_do_not_depend_on_the_number_of_processes(made: Made, tmp_path: Path) -> None:
    path = made("llama", "Q8_0")
    first, second = (
        build.build(plan(path, tmp_path / str(n), weight_type=None, parallel=n)).manifest["files"] for n in (1, 2)
    )
    assert first == second


def test_a_folder_with_a_gguf_alone(made: Made, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"but a GGUF file .*\nGive that file itself"):
        plan(made("llama", "F32").parent, tmp_path / "out")
