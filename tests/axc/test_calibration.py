"""Calibrated weights: GPTQ beside the textbook's loop, the file, what a build makes of it, and what it gains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axc import build, config, console, logits
from axc.calibration import cache, head, run, text
from axc.calibration.file import KEY, CalibrationFile, entries, save
from axc.calibration.options import Options, wanted
from axc.calibration.streamed import Streamed
from axc.checkpoints import EMBEDDING, HEAD, Checkpoint
from axc.compile import weights
from axc.doctor import stored, weight_faults
from axc.quantizer import gptq
from axc.quantizer.round_to_nearest import quantize as round_to_nearest
from axc.weights import float32
from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.bundle import verify
from tests.axc import gguf_files
from tests.axc.test_families import random_model

Floats = NDArray[np.float32]
FAMILIES = ["llama", "phi3", "gemma2", "glm", "glm4", "granite", "starcoder2", "stablelm", "exaone4", "ernie4_5"]
FAMILIES += ["cohere", "nemotron", "olmo", "olmo3", "seed_oss"]


# The algorithm


def correlated(rows: int = 24, columns: int = 96, tokens: int = 400) -> tuple[Any, Any]:
    """A matrix and the Hessian of inputs that hang together, some of them large."""
    torch.manual_seed(0)
    x = torch.randn(tokens, columns) @ torch.randn(columns, columns) * (torch.rand(columns) * 3 + 0.1)
    return torch.randn(rows, columns), x.T @ x


def squared(weights: Any, stored: Any, hessian: Any) -> float:
    difference = (weights - stored).double()
    return float(((difference @ hessian.double()) * difference).sum())


def textbook(weights: Floats, hessian: Floats, scales: Floats, block: int) -> Floats:
    """Optimal brain quantisation in a fixed order, row by row in float64: https://arxiv.org/abs/2208.11580 , (3)."""
    count = weights.shape[1]
    damped = hessian.astype(np.float64) + gptq.DAMP * np.diag(hessian).mean() * np.eye(count)
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, levels = weights.astype(np.float64), np.zeros_like(weights)
    left = list(order)
    for column in order:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        scale = scales[:, column // block]
        levels[:, column] = np.clip(np.rint(w[:, column] / scale), -8, 7)
        error = (w[:, column] - levels[:, column] * scale) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left.remove(column)
    return levels


def test_levels_are_those_of_the_textbook() -> None:
    matrix, hessian = correlated()
    levels, scales = gptq.quantize(matrix, hessian, "INT4", 32)
    expected = textbook(matrix.numpy(), hessian.numpy(), scales.numpy(), 32)
    assert (levels.numpy() == expected).mean() > 0.995  # float32 beside float64: a value between two levels may differ
    assert np.array_equal(scales.numpy(), scales.half().float().numpy())


@pytest.mark.parametrize(("dtype", "block"), [("INT4", 32), ("INT8", 32)])
def test_outputs_are_nearer_than_rounded_to_nearest(dtype: str, block: int) -> None:
    matrix, hessian = correlated()
    levels, scales = gptq.quantize(matrix, hessian, dtype, block)
    nearest, steps, *_ = round_to_nearest(matrix.numpy().reshape(-1, block), dtype)
    plain = torch.from_numpy(nearest * steps[:, None]).reshape(matrix.shape).float()
    ours = squared(matrix, gptq.dequantize(levels, scales), hessian)
    assert ours < 0.6 * squared(matrix, plain, hessian)


def test_the_order_of_columns_within_a_block_does_not_matter() -> None:
    matrix, hessian = correlated()
    order = torch.cat([torch.randperm(32) + start for start in range(0, 96, 32)])
    levels, scales = gptq.quantize(matrix, hessian, "INT4", 32)
    other, others = gptq.quantize(matrix[:, order], hessian[order][:, order], "INT4", 32)
    assert torch.equal(scales, others)
    assert float((levels[:, order] == other).float().mean()) > 0.995


def test_drift_of_the_inputs_is_corrected() -> None:
    """The outputs that count are those for the float model's inputs y, and the layer gets x."""
    torch.manual_seed(1)
    y = torch.randn(500, 64) @ torch.randn(64, 64)
    x = y + 0.3 * torch.randn(500, 64) @ torch.randn(64, 64)
    matrix = torch.randn(32, 64)

    def error(drift: Any) -> float:
        levels, scales = gptq.quantize(matrix, x.T @ x, "INT4", 32, drift)
        return float((y @ matrix.T - x @ gptq.dequantize(levels, scales).T).square().sum())

    assert error((y - x).T @ x) < 0.9 * error(None)


def test_inputs_that_are_always_zero_or_not_finite() -> None:
    matrix, hessian = correlated()
    hessian[5], hessian[:, 5] = 0, 0
    levels, scales = gptq.quantize(matrix, hessian, "INT4", 32)
    assert bool(torch.isfinite(gptq.dequantize(levels, scales)).all())
    levels, scales = gptq.quantize(matrix, torch.zeros(96, 96), "INT4", 32)
    assert float((gptq.dequantize(levels, scales) - matrix).abs().max()) < 1
    hessian[7, 7] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gptq.quantize(matrix, hessian, "INT4", 32)


# The mapping


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_find_their_linears(family: str, tmp_path: Path) -> None:
    """What an axmodel's matrices hold, put back into transformers' layers, is what transformers has there."""
    theirs = random_model(family, {})
    theirs.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = config.load(checkpoint)
    checkpoint = checkpoint.tied() if model.tie_word_embeddings else checkpoint
    streamed = Streamed(checkpoint, model)
    found, others = run.matrices(weights(model), streamed, Options(tmp_path))
    assert not others
    assert {matrix.layer for matrix in found} == {0, 1}
    for index in range(2):
        layer, prefix = streamed.load(index), f"{streamed.prefix}.{index}."
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.zero_()
        for matrix in found:
            if matrix.layer == index:
                values = torch.from_numpy(float32(matrix.name, matrix.source, checkpoint))
                run.put(layer, prefix, matrix, values)
        for name, weight in layer.named_parameters():
            expected = theirs.get_parameter(prefix + name).detach()
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_the_head_gets(family: str, tmp_path: Path) -> None:
    """That of transformers' whole model, from the outputs of its last layer."""
    theirs: Any = random_model(family, {}).float().eval()
    theirs.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = config.load(checkpoint)
    streamed = Streamed(checkpoint.tied() if model.tie_word_embeddings else checkpoint, model)
    found = head.find(weights(model), streamed)
    assert found is not None
    assert found.source.shape == tuple(theirs.get_output_embeddings().weight.shape)
    seen: list[Any] = []
    last = theirs.get_submodule(f"{streamed.prefix}.{len(streamed.layers) - 1}")
    last.register_forward_hook(lambda _, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    theirs.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    theirs(torch.arange(12)[None])
    with streamed.before_head() as before:
        torch.testing.assert_close(before(seen[0]), seen[1][0], rtol=1e-5, atol=1e-6)


# The file


@pytest.fixture(scope="session")
def words(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on: the first half of the held-out one, whose second half is measured on."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text((tiny_qwen2 / "heldout.txt").read_text()[:6000])
    return path


def options(folder: Path, words: Path, **more: Any) -> Options:
    return Options(folder, **{"calibration": (words,), "tokens": 1024, "window": 64, **more})


@pytest.fixture(scope="session")
def calibrated(tiny_qwen2: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """tiny-qwen2 in 4 bits, in 5.5 and in 8."""
    folder = tmp_path_factory.mktemp("calibrated")
    asked: dict[str, dict[str, Any]] = {"4": {}, "5.5": {"bits": 5.5}, "8": {"weight_type": "s8"}}
    return {
        name: run.calibrate(options(tiny_qwen2, words, **more), folder / f"{name}.safetensors")
        for name, more in asked.items()
    }


def dequantised(path: Path) -> dict[str, Floats]:
    """By what the file's specification says, not by our reader."""
    found = {}
    with safe_open(path, "np") as file:
        for name, entry in json.loads(file.metadata()[KEY])["weights"].items():
            levels, scales = file.get_tensor(name), file.get_tensor(f"{name}_scale").astype(np.float32)
            if entry["type"] == "s4":
                levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(len(levels), -1).astype(np.int8)
                levels = np.where(levels > 7, levels - 16, levels)
            blocks = levels.reshape(*scales.shape, entry["block"]).astype(np.float32)
            found[name] = (blocks * scales[..., None]).reshape(levels.shape)
    return found


@torch.no_grad()
def divergence(folder: Path, replaced: Mapping[str, Floats]) -> float:
    """Mean KLD of transformers with these weights from itself, over text that no calibration saw."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer.encode((folder / "heldout.txt").read_text()[9000:], add_special_tokens=False)[:512])
    exact = model(ids[None]).logits[0].log_softmax(-1)
    for name, values in replaced.items():
        model.get_parameter(name).copy_(torch.from_numpy(values))
    other = model(ids[None]).logits[0].log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def test_what_calibration_gains(calibrated: Mapping[str, Path], tiny_qwen2: Path) -> None:
    """transformers computes with the weights: 4 bits come nearer than rounded to nearest, 5.5 and 8 nearer yet."""
    exact = {name: dequantised(path) for name, path in calibrated.items()}
    found = {name: divergence(tiny_qwen2, values) for name, values in exact.items()}
    checkpoint = load_file(tiny_qwen2 / "model.safetensors")
    nearest = {}
    for name in exact["4"].keys() - {EMBEDDING, HEAD}:
        raw = checkpoint[name].astype(np.float32)
        levels, scales, *_ = round_to_nearest(raw.reshape(-1, 32), "INT4", "FLOAT16")
        nearest[name] = (levels * np.asarray(scales, np.float32)[:, None]).reshape(raw.shape)
    assert found["4"] < 0.75 * divergence(tiny_qwen2, nearest)
    assert found["8"] < 0.1 * found["5.5"] < 0.1 * 0.75 * found["4"]


def test_bits_are_met(calibrated: Mapping[str, Path]) -> None:
    found = CalibrationFile.open(calibrated["5.5"])
    sizes = {name: values.size for name, values in dequantised(calibrated["5.5"]).items() if "layers" in name}
    average = sum(found.weights[name].bits * size for name, size in sizes.items()) / sum(sizes.values())
    assert 5.3 < average <= 5.5
    assert found.bits == pytest.approx(average, abs=1e-3)
    assert {entry.type for entry in found.weights.values()} == {"s4", "s8"}
    assert CalibrationFile.open(calibrated["4"]).bits == 4.5


def test_recorded_errors(calibrated: Mapping[str, Path], tiny_qwen2: Path) -> None:
    checkpoint, values = load_file(tiny_qwen2 / "model.safetensors"), dequantised(calibrated["4"])
    for name, entry in CalibrationFile.open(calibrated["4"]).weights.items():
        exact = checkpoint[name].astype(np.float64)
        error = np.sqrt(np.square(values[name] - exact).sum() / np.square(exact).sum())
        assert entry.error == pytest.approx(error, rel=2e-3)


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_calibration_goes_on(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "again.safetensors"

    def kill(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        run.calibrate(options(tiny_qwen2, words), output, kill)
    assert not output.exists()
    quantised, real = [], run._quantise
    monkeypatch.setattr(run, "_quantise", lambda *given: quantised.append(given[2]) or real(*given))  # type: ignore[func-returns-value]
    run.calibrate(options(tiny_qwen2, words), output)
    assert quantised == ["model.layers.2.", "model.layers.3."]
    assert output.read_bytes() == calibrated["4"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


# The build


def test_a_build_writes_these_levels(calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path) -> None:
    """Read back by onnx, bit for bit; the same bytes in two processes."""
    path = calibrated["5.5"]
    manifests = []
    for parallel in (1, 2):
        asked = build.Options(tiny_qwen2, tmp_path / str(parallel), calibrated=path, parallel=parallel, kv_cache_len=63)
        manifests.append(build.build(build.plan(asked)).manifest)
    assert manifests[0]["files"] == manifests[1]["files"]
    assert manifests[0]["calibration"]["sha256"] == CalibrationFile.open(path).sha256
    expected, tensors = load_file(path), dict[str, Any]()
    for file in (tmp_path / "1").glob("*.axmodel"):
        tensors |= {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    for name, entry in manifests[0]["calibration"]["weights"].items():
        raw = np.frombuffer(tensors[name].raw_data, expected[name].dtype)
        assert np.array_equal(raw, expected[name].reshape(-1))
        assert tensors[name].data_type == (onnx.TensorProto.INT4 if entry["type"] == "s4" else onnx.TensorProto.INT8)
        assert np.array_equal(numpy_helper.to_array(tensors[f"{name}_scale"]), expected[f"{name}_scale"])
    again = build.build(build.plan(build.Options(tiny_qwen2, tmp_path / "1", calibrated=path, kv_cache_len=63)))
    assert not again.fresh


def test_levels_of_another_matrix_are_found_while_building(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    """The file's own digest is right: only the checkpoint tells that two matrices of one shape were exchanged."""
    path, tensors = tmp_path / "exchanged.safetensors", load_file(calibrated["4"])
    gate, up = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    for end in ("", "_scale"):
        tensors[gate + end], tensors[up + end] = tensors[up + end], tensors[gate + end]
    with safe_open(calibrated["4"], "np") as file:
        save(path, tensors, json.loads(file.metadata()[KEY]))
    asked = build.Options(tiny_qwen2, tmp_path / "out", calibrated=path, kv_cache_len=63)
    with pytest.raises(BadInput, match=r"mlp\.(gate|up)_proj\.weight differs from the checkpoint by 1\.\d+; its"):
        build.build(build.plan(asked))
    assert not (tmp_path / "out").exists()


def test_the_doctor_knows_calibrated_levels(calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path) -> None:
    """They are not the nearest ones, and still not any: one that changed is found by the error that was recorded."""
    asked = build.Options(tiny_qwen2, tmp_path / "bundle", calibrated=calibrated["4"], kv_cache_len=63)
    manifest = build.build(build.plan(asked)).manifest
    checkpoint, name = load_file(tiny_qwen2 / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    entry = entries(manifest)[name]

    def fault() -> weight_faults.Fault | None:
        kept = stored.read(axmodel.read(tmp_path / "bundle" / (manifest["model"]["layer_file"] % 1)))[name]
        return weight_faults.unlike_calibrated(kept, name, lambda *at: widened(checkpoint[at[0]], *at[1:]), entry.error)

    assert fault() is None
    path = tmp_path / "bundle" / (manifest["model"]["layer_file"] % 1)
    levels, content = load_file(calibrated["4"])[name].tobytes(), path.read_bytes()
    assert content.count(levels) == 1
    path.write_bytes(content.replace(levels, bytes(byte ^ 0x33 for byte in levels[:200]) + levels[200:]))
    found = fault()
    assert found is not None
    assert "differ from those of the calibration" in found.cause


def test_reference_logits_are_added_to_a_calibrated_bundle(
    calibrated: Mapping[str, Path], words: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Its manifest lists the calibration file beside the files of the checkpoint."""
    output = tmp_path / "bundle"
    build.build(build.plan(build.Options(tiny_qwen2, output, calibrated=calibrated["4"], kv_cache_len=63)))
    asked = logits.Options(tiny_qwen2, words, bundle=output, window=32, tokens=64, greedy_tokens=2)
    said: list[str] = []
    path, written = logits.write(asked, say=said.append)
    assert path.parent == output
    assert "calibration" not in written.about["inputs"]
    assert any(line.startswith("figures.npz for axrun doctor: ") for line in said)
    verify(output)


def widened(tensor: Floats, start: int, stop: int) -> Floats:
    return tensor[start:stop].astype(np.float32)


def test_a_file_of_another_checkpoint_is_refused(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_qwen2 / name).read_bytes())
    tensors = load_file(tiny_qwen2 / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * 2
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="made from another checkpoint"):
        build.plan(build.Options(tmp_path, tmp_path / "out", calibrated=calibrated["4"]))
    with pytest.raises(BadInput, match="--calibrated_sha256 is 'abc'"):
        build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=calibrated["4"], calibrated_sha256="abc"))
    with pytest.raises(BadInput, match="--weight_type is s8"):
        build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=calibrated["4"], weight_type="s8"))


SCALE = "model.layers.0.mlp.up_proj.weight_scale"


def _spoiled(tensors: dict[str, Any], header: dict[str, Any], how: str) -> None:
    entry = header["weights"][SCALE.removesuffix("_scale")]
    if how == "no scales":
        del tensors[SCALE]
    elif how == "a scale of 0":
        tensors[SCALE][3, 1] = 0
    elif how == "other shape":
        tensors[SCALE] = tensors[SCALE][:-1]
    elif how == "float32 scales":
        tensors[SCALE] = tensors[SCALE].astype(np.float32)
    elif how == "another type":
        entry["type"] = "s8"
    elif how == "odd block":
        entry["block"] = 0
    elif how == "one level":
        tensors[SCALE.removesuffix("_scale")][5, 7] ^= 1
    else:
        del header["weights"]


DAMAGES = [
    *("no scales", "a scale of 0", "other shape", "float32 scales"),
    *("another type", "odd block", "one level", "no weights"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_refused(how: str, calibrated: Mapping[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    tensors = load_file(calibrated["4"])
    with safe_open(calibrated["4"], "np") as file:
        header = json.loads(file.metadata()[KEY])
    _spoiled(tensors, header, how)
    save_file(tensors, path, {KEY: json.dumps(header)})
    with pytest.raises(BadInput, match=r"damaged\.safetensors"):
        CalibrationFile.open(path)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_truncated_file_is_refused(size: int, calibrated: Mapping[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(calibrated["4"].read_bytes()[:size])
    with pytest.raises(BadInput, match="is no calibration file"):
        CalibrationFile.open(path)


def test_a_damaged_file_in_the_cache_is_made_again(
    calibrated: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cached.safetensors"
    path.write_bytes(calibrated["4"].read_bytes()[:3000])
    monkeypatch.setattr(cache, "place", lambda _: path)
    monkeypatch.setattr(console, "calibrate", lambda _, to: to.write_bytes(calibrated["4"].read_bytes()))
    assert console._calibrated(Options(tmp_path)) == path
    assert path.read_bytes() == calibrated["4"].read_bytes()
    assert "is no calibration file" in (said := capsys.readouterr().out)
    assert said.endswith("; calibrating again\n")
    assert console._calibrated(Options(tmp_path)) == path
    assert capsys.readouterr().out == f"note: calibration taken from the cache: {path}\n"


def test_who_calibrates(tiny_qwen2: Path, tmp_path: Path) -> None:
    """s4 does, unless it is told not to, or the checkpoint has levels that s4 keeps."""
    lossy = gguf_files.write(tmp_path / "lossy.gguf", "llama", GGMLQuantizationType.Q4_1)
    packed = gguf_files.write(tmp_path / "packed.gguf", "llama", GGMLQuantizationType.Q4_0)
    rows: list[tuple[Path, str | None, str | None, Path | None, float | None, list[Path], bool]] = [
        (tiny_qwen2, "s4", None, None, None, [], True),
        (tiny_qwen2, "s4", "rtn", None, None, [], False),
        (tiny_qwen2, None, None, None, None, [], False),
        (tiny_qwen2, "s8", None, None, None, [], False),
        (tiny_qwen2, "s8", "gptq", None, None, [], True),
        (tiny_qwen2, None, None, None, 5.0, [], True),
        (tiny_qwen2, "s4", None, tmp_path, None, [], False),
        (packed, "s4", None, None, None, [], False),
        (lossy, "s4", None, None, None, [], True),
        (lossy, "s4", "rtn", None, None, [], False),
    ]
    for path, kind, quantizer, given, bits, texts, expected in rows:
        assert wanted(path, kind, quantizer, given, bits, texts) == expected, (path, kind, quantizer)
    with pytest.raises(BadInput, match="--bits belongs to --quantizer gptq"):
        wanted(tiny_qwen2, "s4", "rtn", None, 5.0, [])
    with pytest.raises(BadInput, match="--bits cannot change a finished calibration"):
        wanted(tiny_qwen2, "s4", None, tmp_path, 5.0, [])
    with pytest.raises(BadInput, match="--quantizer cannot change a finished calibration"):
        wanted(tiny_qwen2, "s4", "gptq", tmp_path, None, [])


def test_a_gguf_of_floats_is_calibrated(words: Path, tmp_path: Path) -> None:
    path = gguf_files.write(
        tmp_path / "floats.gguf", "llama", GGMLQuantizationType.BF16, head=GGMLQuantizationType.BF16
    )
    output = run.calibrate(options(path, words, tokens=128, window=32), tmp_path / "out.safetensors")
    planned = build.plan(build.Options(path, tmp_path / "bundle", calibrated=output, kv_cache_len=63))
    assert {name: kept.bits for name, kept in planned.kept.items() if kept.bits != 4.5} == {HEAD: 8.25}
    assert len(planned.kept) == 15


def test_a_quantised_gguf_is_calibrated_unless_its_levels_are_kept(words: Path, tmp_path: Path) -> None:
    """From the values that Q4_1 stands for; the head, in Q8_0, keeps its levels."""
    kinds = GGMLQuantizationType
    path = gguf_files.write(tmp_path / "lossy.gguf", "llama", kinds.Q4_1, head=kinds.Q8_0)
    output = run.calibrate(options(path, words, tokens=128, window=32), tmp_path / "out.safetensors")
    planned = build.plan(build.Options(path, tmp_path / "bundle", calibrated=output, kv_cache_len=63))
    assert [kept.tensor for kept in planned.kept.values() if not kept.calibrated] == [HEAD]
    assert len(planned.kept) == 15
    assert planned.notices[0] == "14 matrices stored as Q4_1 dequantised, and stored again as s4, calibrated: not exact"
    assert build.build(planned).fresh  # measures the errors against the checkpoint's values, as calibration did
    packed = gguf_files.write(tmp_path / "packed.gguf", "llama", kinds.Q4_0, head=kinds.Q8_0)
    with pytest.raises(BadInput, match=r"packed\.gguf is quantised already: s4 keeps its levels \(Q4_0\) exactly"):
        run.calibrate(options(packed, words, tokens=128, window=32), tmp_path / "out.safetensors")


def test_progress_is_printed_where_there_is_no_terminal(
    tiny_qwen2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an interrupted calibration says that it continues, once it has a finished layer."""
    output, save = tmp_path / "out.safetensors", run._save

    def interrupted(path: Path, result: Any) -> None:
        if path.name == last:
            raise KeyboardInterrupt
        save(path, result)

    monkeypatch.setattr(run, "_save", interrupted)
    for last, said in (  # noqa: B007  (read by `interrupted`)
        ("0.safetensors", "^$"),
        ("1.safetensors", "^finished layers are kept: run the same command again$"),
    ):
        with pytest.raises(KeyboardInterrupt, match=said):
            console.calibrate(options(tiny_qwen2, words, tokens=64), output)
    assert "about 1 to 10 s on 2 cores" in capsys.readouterr().out
    monkeypatch.setattr(run, "_save", save)
    console.calibrate(options(tiny_qwen2, words, tokens=64), output)
    steps = [*(f"layer {at} of 4" for at in range(1, 5)), "head", "writing"]
    assert capsys.readouterr().err.splitlines() == [f"calibrate {step}" for step in steps]


def test_texts_that_cannot_be_used(tmp_path: Path, tiny_qwen2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    good = tmp_path / "good.txt"
    good.write_bytes(b"\xef\xbb\xbf" + (tiny_qwen2 / "heldout.txt").read_bytes())
    rows: list[tuple[str, bytes | None, str]] = [
        ("empty.txt", b"", r"empty\.txt has 0 tokens; expected 64 or more"),
        ("short.txt", b"A few words.", r"short\.txt has \d+ tokens; expected 64"),
        ("utf-16.txt", "Words.".encode("utf-16"), "is no UTF-8 text: byte 0"),
        ("utf-16-le.txt", "Words.".encode("utf-16-le"), "is no text: byte 1 is 0"),
        ("model.bin", "Größe".encode() + b"\0\1", "is no text: byte 7 is 0"),
        ("latin-1.txt", "Größe".encode("latin-1"), "is no UTF-8 text: byte 2"),
        ("none.txt", None, "cannot read"),
        (".", None, "is no regular file"),
    ]
    for name, content, words in rows:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        for paths in ((path,), (good, path)):
            with pytest.raises(BadInput, match=words):
                text.windows(paths, tokenizer, 1024, 64, 640)
    with pytest.raises(BadInput, match="--calibration_tokens is 100; expected 64 or more for each of 2 texts"):
        text.windows((good, good), tokenizer, 100, 64, 640)
    whole = text.windows((good,), tokenizer, 1024, 64, 640).windows.reshape(-1)
    expected = tokenizer.encode((tiny_qwen2 / "heldout.txt").read_text(), add_special_tokens=False)
    assert whole.tolist() == expected[: len(whole)]  # without the byte order mark, and not cut


def test_two_processes_do_not_write_one_file(tiny_qwen2: Path, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "one.safetensors"

    def second(done: int, total: int, what: str) -> None:
        with pytest.raises(BadInput, match=r"another process is writing .*one\.safetensors"):
            run.calibrate(options(tiny_qwen2, words, tokens=64), output)
        raise Killed

    with pytest.raises(Killed):
        run.calibrate(options(tiny_qwen2, words, tokens=64), output, second)
    with pytest.raises(BadInput, match="is a folder"):
        run.calibrate(options(tiny_qwen2, words, tokens=64), tmp_path)


def test_a_damaged_layer_is_calibrated_again(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, words: Path, tmp_path: Path
) -> None:
    """What a power cut leaves: a file without its content."""
    output = tmp_path / "again.safetensors"

    def cut(done: int, total: int, what: str) -> None:
        if done == 3:
            (tmp_path / "again.safetensors.layers" / "1.safetensors").write_bytes(b"")
            raise Killed

    with pytest.raises(Killed):
        run.calibrate(options(tiny_qwen2, words), output, cut)
    run.calibrate(options(tiny_qwen2, words), output)
    assert output.read_bytes() == calibrated["4"].read_bytes()


def test_a_build_is_planned_before_it_calibrates(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_calibrated", lambda _: pytest.fail("calibrated first"))
    asked = build.Options(tiny_qwen2, tmp_path / "out", weight_type="s4", kv_cache_len=1 << 19)
    with pytest.raises(BadInput, match="--kv_cache_len"):
        console.llm_build(asked, 0, "", None, Options(tiny_qwen2))


def test_another_bundle_is_refused_before_the_calibration(
    calibrated: Mapping[str, Path],
    words: Path,
    tiny_qwen2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(console, "_calibrated", lambda _: pytest.fail("calibrated first"))
    nearest, output = tmp_path / "s8", tmp_path / "4"
    build.build(build.plan(build.Options(tiny_qwen2, nearest, kv_cache_len=63)))
    build.build(build.plan(build.Options(tiny_qwen2, output, calibrated=calibrated["4"], kv_cache_len=63)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    for path, kind, more, said in (
        (nearest, "s4", {}, "it has --weight_type s8, this build s4"),
        (nearest, "s8", {"weight_type": "s8"}, "it was not calibrated, this build is"),
        (output, None, {"bits": 5.5}, "it was calibrated with --bits none, this build with 5.5"),
        (output, "s4", {"calibration": ()}, "it was calibrated on another text"),
        (tmp_path / "folder", "s4", {}, "something that is no bundle"),
    ):
        asked = build.Options(tiny_qwen2, path, weight_type=kind, kv_cache_len=63)
        with pytest.raises(BadInput, match=rf"{said}.*\n.*--output_path \(make: OUT=folder\)"):
            console.llm_build(asked, 0, "", None, options(tiny_qwen2, words, **more))
    monkeypatch.setattr(console, "_calibrated", lambda _: calibrated["4"])
    asked = build.Options(tiny_qwen2, output, weight_type="s4", kv_cache_len=63)
    console.llm_build(asked, -1, "", None, options(tiny_qwen2, words))
    assert "nothing to build" in capsys.readouterr().out


def test_another_calibration_is_named(calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path) -> None:
    def built(name: str | None, **more: Any) -> build.Built:
        path = calibrated[name] if name else None
        return build.build(build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=path, **more)))

    built("4")
    with pytest.raises(BadInput, match=r"another bundle: it was calibrated with --bits none, this build with 5\.5"):
        built("5.5")
    with pytest.raises(BadInput, match="another bundle: it was calibrated, this build is not"):
        built(None, weight_type="s4", post_weight_type="s8")


@pytest.mark.parametrize(("kind", "bits", "said"), [(None, None, True), ("s4", None, False), (None, 5.0, False)])
def test_a_build_without_w_says_that_it_calibrates_s4(
    kind: str | None,
    bits: float | None,
    said: bool,
    tiny_qwen2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(_: Options) -> Path:
        raise BadInput("enough")

    monkeypatch.setattr(console, "_calibrated", refused)
    asked = build.Options(tiny_qwen2, tmp_path / "out", weight_type=kind)
    with pytest.raises(BadInput, match="enough"):
        console.llm_build(asked, 0, "", None, Options(tiny_qwen2, bits=bits))
    assert ("note: without -w, calibrated weights are s4; for 8 bits, set -w s8" in capsys.readouterr().out) == said


def test_the_head_of_another_type_is_not_taken(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    path = calibrated["4"]

    def stored_head(**more: Any) -> Any:
        kept = build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=path, kv_cache_len=63, **more)).kept
        return kept.get(EMBEDDING) or kept.get(HEAD)

    assert stored_head().bits == stored_head(post_weight_type="s8").bits == 8.25
    assert stored_head(post_weight_type="bf16") is None


def test_outputs_of_the_head_are_nearer_than_rounded_to_nearest(
    calibrated: Mapping[str, Path], tiny_qwen2: Path
) -> None:
    """By what transformers makes of float hidden states."""
    values = dequantised(calibrated["8"])
    name = next(name for name in values if name in (EMBEDDING, HEAD))
    raw = load_file(tiny_qwen2 / "model.safetensors")[name].astype(np.float32)
    levels, scales, *_ = round_to_nearest(raw, "INT8")
    assert head_divergence(tiny_qwen2, values[name]) < 0.6 * head_divergence(tiny_qwen2, levels * scales[:, None])


@torch.no_grad()
def head_divergence(folder: Path, weights: Floats) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder).encode((folder / "heldout.txt").read_text()[9000:])[:512])
    hidden = model.model(ids[None]).last_hidden_state[0]
    exact, other = ((hidden @ w.T).log_softmax(-1) for w in (model.lm_head.weight, torch.from_numpy(weights)))
    return float((exact.exp() * (exact - other)).sum(-1).mean())
