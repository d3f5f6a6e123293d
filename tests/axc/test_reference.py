"""The reference: equal to transformers, also with little memory; and its errors."""

from __future__ import annotations

import codecs
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from axc import build, check, expected
from axc.build import Options
from axc.reference import HEADROOM, Reference, Refused, tokenizer
from axc.synth import synth
from axrun.errors import BadInput, CheckFailed

IDS = np.random.default_rng(2).integers(0, 640, 90)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
FLOATS: dict[str, Any] = {"hidden_state_type": "fp32", "weight_type": "fp32", "post_weight_type": "fp32"}


def made(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random checkpoint."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    auto.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def config(kind: Any = transformers.LlamaConfig, **keys: Any) -> Any:
    return kind(**{**SMALL, **keys})


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.MistralConfig])
def test_layers_converted_one_at_a_time_give_the_same_bits(kind: Any, tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config(kind))
    whole, streamed = Reference(folder), Reference(folder, available=HEADROOM + 300_000)
    assert not whole.remarks
    assert "one layer at a time" in streamed.remarks[0]
    assert {weight.dtype for weight in streamed.model.model.layers.parameters()} == {torch.bfloat16}
    one, other = whole.trace(IDS), streamed.trace(IDS)
    assert len(one.outputs) == 3
    for mine, theirs in zip(
        [*one.inputs, *one.outputs, one.logits], [*other.inputs, *other.outputs, other.logits], strict=True
    ):
        assert mine.tobytes() == theirs.tobytes()
    answers = [each.generate(IDS.reshape(3, 30), 6, keep_logits=True) for each in (whole, streamed)]
    assert answers[0].logits.tobytes() == answers[1].logits.tobytes()
    assert {weight.dtype for weight in streamed.model.model.layers.parameters()} == {torch.bfloat16}


def test_a_pass_matches_transformers(tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model(torch.from_numpy(IDS)[None], output_hidden_states=True)
    trace = Reference(folder).trace(IDS)
    for index, given in enumerate(trace.inputs):
        np.testing.assert_allclose(given, out.hidden_states[index][0].numpy(), atol=1e-4)
    np.testing.assert_allclose(trace.logits, out.logits[0].numpy(), atol=1e-4)


def test_too_little_memory_is_refused_before_loading(tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config())
    with pytest.raises(BadInput, match=r"needs 1,074 MB of memory, 1 MB are available"):
        Reference(folder, available=1_000_000)


def test_mixed_types_are_not_converted_layer_by_layer(tmp_path: Path) -> None:
    """A common type would round some weights."""
    from safetensors.torch import load_file, save_file

    folder = made(tmp_path / "hf", config())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="memory"):
        Reference(folder, available=HEADROOM + 300_000)
    assert torch.equal(Reference(folder).model.model.norm.weight, weights["model.norm.weight"])


def test_an_unknown_model_type_is_read_as_the_given_one_with_a_remark(tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "house_brand"}))
    with pytest.raises(Refused, match="does not know model_type 'house_brand'"):
        Reference(folder)
    bundle: Any = None  # not opened without a reference
    with pytest.raises(CheckFailed, match=r"there is no reference to compare with\nBuild with --check_level 0"):
        expected.expect(Options(folder, tmp_path / "out"), bundle, "", [], print)
    reference = Reference(folder, model_type="llama")
    assert reference.model_type == "llama"
    assert "this choice is not checked" in reference.remarks[0]


def test_a_known_model_type_ignores_the_flag(tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config(transformers.MistralConfig, sliding_window=64))
    assert Reference(folder, model_type="llama").model_type == "mistral"


def built(folder: Path, output: Path, **options: Any) -> build.Plan:
    plan = build.plan(Options(folder, output, **options))
    build.build(plan)
    return plan


def test_a_window_far_behind_the_walk_is_found(tmp_path: Path) -> None:
    """The context is longer than the walk, and the window has an effect only in the probes beyond it."""
    windowed = made(tmp_path / "mistral", config(transformers.MistralConfig, sliding_window=900))
    values = json.loads((windowed / "config.json").read_text())
    folder = Path(shutil.copytree(windowed, tmp_path / "llama"))
    plain = {**values, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    plain.pop("sliding_window")
    (folder / "config.json").write_text(json.dumps(plain))
    groups = {"prefill_len": 128, "kv_cache_len": 1535, "last_kv_cache_len": (128, 512, 1024)}
    plan = built(folder, tmp_path / "out", **FLOATS, **groups)
    said: list[str] = []
    check.check(plan, 1, "", said.append)
    assert "640 tokens and behind 1024, 1519, 1532 rows of history: to the end of the context of 1535" in said[2]
    misread = dataclasses.replace(plan, options=dataclasses.replace(plan.options, input_path=windowed))
    with pytest.raises(CheckFailed, match=r"layer 0 in (far|end)"):
        check.check(misread, 1, "", said.append)


def test_a_window_of_most_of_the_context_is_found_in_small_types(tmp_path: Path) -> None:
    """s8 weights, bfloat16: only the oldest 2 of 12 thousand rows make the difference."""
    windowed = made(tmp_path / "mistral", config(transformers.MistralConfig, sliding_window=10000, num_hidden_layers=2))
    folder = Path(shutil.copytree(windowed, tmp_path / "llama"))
    values = json.loads((windowed / "config.json").read_text())
    plain = {key: value for key, value in values.items() if key != "sliding_window"}
    plain |= {"model_type": "llama", "max_position_embeddings": 12000}
    (folder / "config.json").write_text(json.dumps(plain))
    plan = built(folder, tmp_path / "out", prefill_len=128, kv_cache_len=11999)
    assert (plan.target.hidden_state_type, plan.target.weight_type) == ("bf16", "s8")
    check.check(plan, 1, "", lambda line: None)
    misread = dataclasses.replace(plan, options=dataclasses.replace(plan.options, input_path=windowed))
    with pytest.raises(CheckFailed, match=r"layer 0 in (far|end)"):
        check.check(misread, 1, "", lambda line: None)


def test_return_dict_in_config_json_has_no_effect(tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config())
    wanted = Reference(folder).logits(IDS)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "return_dict": False}))
    reference = Reference(folder)
    np.testing.assert_array_equal(reference.logits(IDS), wanted)
    assert reference.generate(IDS[None], 1).tokens.shape == (1, 1)
    reference.trace(IDS)


def test_exceptions_of_transformers_become_one_line(tmp_path: Path) -> None:
    reference = Reference(made(tmp_path / "hf", config()))
    beyond = np.array([640])
    for call in (reference.logits, reference.trace, lambda ids: reference.generate(ids[None], 1)):
        with pytest.raises(Refused, match=r"transformers \S+ cannot run \S+: index out of range"):
            call(beyond)


def test_a_folder_named_like_a_weight_file_is_ignored(tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config())
    (folder / "pytorch_model.bin").mkdir()
    assert Reference(folder).stored == {torch.bfloat16}


def test_a_bundle_without_prefill_is_checked(tmp_path: Path) -> None:
    folder = made(tmp_path / "hf", config())
    said: list[str] = []
    check.check(built(folder, tmp_path / "out", kv_cache_len=300), 1, "", said.append)
    assert "96 tokens and behind 284, 297 rows of history: to the end of the context of 300" in said[2]


def test_random_weights_of_another_type_pass(tmp_path: Path) -> None:
    """Stored in float16, compiled in bfloat16: rounding is not a fault."""
    folder = made(tmp_path / "hf", config(initializer_range=0.05), torch.float16)
    types = {"weight_type": "bf16", "post_weight_type": "bf16"}
    check.check(built(folder, tmp_path / "out", prefill_len=32, kv_cache_len=127, **types), 2, "", lambda line: None)


def test_the_synthetic_checkpoint_passes(tmp_path: Path) -> None:
    values = {**SMALL, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}
    synth("qwen2-0.5b", tmp_path / "hf", config=values)
    check.check(built(tmp_path / "hf", tmp_path / "out", prefill_len=32), 2, "", lambda line: None)


def test_a_byte_order_mark_that_transformers_cannot_read_is_named(tiny_qwen2: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        shutil.copy(tiny_qwen2 / name, tmp_path)
    marked = tmp_path / "tokenizer_config.json"
    marked.write_bytes(codecs.BOM_UTF8 + (tiny_qwen2 / marked.name).read_bytes())
    with pytest.raises(Refused, match=r"tokenizer_config\.json begins with a byte order mark: remove"):
        tokenizer(tmp_path)
