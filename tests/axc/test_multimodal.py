"""The text model of a multimodal checkpoint, compared with transformers' complete model on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from axc import build, check, config
from axc.calibration.streamed import Streamed
from axc.checkpoints import Checkpoint, Lora
from axc.reference import Reference
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.model import Model
from tests.axc.as_transformers import FP32, IDS, SMALL, change_config, plan, random_model, same

TEXT = {key: value for key, value in SMALL.items() if not key.endswith("_id")}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "in_channels": 3}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
# model_type -> its text model's, vision_config, what is particular of the whole
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"model_type": "gemma3_text", "head_dim": 16, **SLIDING},
        {"model_type": "siglip_vision_model", **VISION},
        {"mm_tokens_per_image": 4, "image_token_index": 90},
    ),
    "mistral3": (
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        {"model_type": "pixtral", **VISION},
        {"image_token_index": 90, "tie_word_embeddings": False},
    ),
    "qwen2_vl": (
        {"rope_parameters": MROPE},
        {"hidden_size": 64, **QWEN_VISION},
        {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92},
    ),
    "qwen2_5_vl": (
        {"rope_parameters": MROPE, "tie_word_embeddings": True},
        {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 64, "num_heads": 2, "depth": 1},
        {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92},
    ),
    "qwen3_vl": (
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 16},
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "depth": 1,
            "deepstack_visual_indexes": [0],
        },
        {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92},
    ),
}


def saved(kind: str, folder: Path) -> Any:
    text, vision, more = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind, text_config={**TEXT, **text}, vision_config=vision, **more)
    model = random_model(config, auto=transformers.AutoModelForImageTextToText)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def expected(model: Any) -> Any:
    return model(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()


def ours(folder: Path, output: Path) -> tuple[Any, build.Plan]:
    planned = plan(folder, output)
    build.build(planned)
    return Model.load(Bundle.open(output)).forward(IDS.tolist(), 0, logits="all"), planned


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_those_of_the_whole_model_given_text(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "hf")
    logits, planned = ours(tmp_path / "hf", tmp_path / "out")
    assert same(logits, expected(model))
    notices = "\n".join(planned.notices)
    assert f"of this {kind} the text model" in notices
    assert "left out: vision_config" in notices
    assert "tensors of other parts than the text model: not read" in notices
    check.check(planned, 1, "", lambda line: None)


def renamed(folder: Path, *pairs: tuple[str, str]) -> None:
    """Gives each tensor whose name begins with the first of a pair the second instead."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in pairs:
        assert any(name.startswith(old) for name in tensors)
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_names_and_keys_of_other_versions(tmp_path: Path) -> None:
    """The names of tensors that transformers 5 has in memory; and Qwen2-VL's config.json of 4, without text_config."""
    folder = tmp_path / "gemma3"
    logits = expected(saved("gemma3", folder))
    renamed(
        folder,
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    assert same(ours(folder, tmp_path / "out")[0], logits)

    folder = tmp_path / "qwen2_vl"
    logits = expected(saved("qwen2_vl", folder))
    values = json.loads((folder / "config.json").read_text())
    text = values.pop("text_config")
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    text = {key: value for key, value in text.items() if key not in ("rope_parameters", "model_type", "dtype")}
    (folder / "config.json").write_text(json.dumps({**text, **rope, **values}))
    renamed(folder, ("model.", "model.language_model."), ("visual.", "model.visual."))
    assert same(ours(folder, tmp_path / "out2")[0], logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, "text_config of a gemma3 is None; expected an object"),
        ({"text_config": "x"}, "text_config of a gemma3 is 'x'"),
        ({"text_config": {"model_type": "llama"}}, "the text model of this gemma3 is 'llama'; built are gemma3_text"),
        ({"text_config": {"model_type": ["llama"]}}, "the text model of this gemma3 is"),
        ({"model_type": "paligemma"}, "model_type 'paligemma' is not supported"),
        ({"model_type": "gemma3_text"}, "text_config is "),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved("gemma3", tmp_path / "hf")
    change_config(tmp_path / "hf", changes)
    with pytest.raises(BadInput) as refused:
        plan(tmp_path / "hf", tmp_path / "out", **FP32)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def test_a_tensor_stored_under_both_names_is_refused(tmp_path: Path) -> None:
    saved("gemma3", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    norm = torch.from_numpy(np.ones(SMALL["hidden_size"], np.float32))
    save_file({**tensors, "model.language_model.norm.weight": norm}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(BadInput, match=r"are both model\.norm\.weight of the text model"):
        plan(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_finds_the_layers_of_the_text_model(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    streamed = Streamed(checkpoint, config.load(checkpoint))
    assert streamed.prefix == "model.layers"
    assert len(streamed.layers) == SMALL["num_hidden_layers"]
    streamed.load(1)
    entered, calls = streamed.enter(torch.from_numpy(IDS[:8])[None])
    assert [tuple(rows.shape) for rows in entered] == [(1, 8, SMALL["hidden_size"])]
    assert len(calls) == len(streamed.layers)


def with_adapter(model: Any, to: Path, targets: str) -> Any:
    """Saves a random adapter of a model, and returns the model merged with it."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(str(to))
    return adapted.merge_and_unload()


# how transformers 4 called the modules
OLD_NAMES = {
    "gemma3": {"model.language_model.": "language_model.model."},
    "mistral3": {"model.language_model.": "language_model.model."},
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


@pytest.mark.parametrize("older", [False, True], ids=["names of transformers 5", "of transformers 4"])
@pytest.mark.parametrize("kind", OLD_NAMES)
def test_an_adapter_of_the_whole_model(tmp_path: Path, kind: str, older: bool) -> None:
    """Its changes of other parts do not reach text: they are counted, as the tensors of these parts are."""
    folder, one = tmp_path / "hf", tmp_path / "adapter"
    merged = with_adapter(saved(kind, folder), one, r".*\.(q_proj|down_proj|qkv|fc1)")
    path = one / "adapter_model.safetensors"
    tensors = load_file(path)
    others = sum("language_model" not in name for name in tensors) // 2
    assert others
    if older:
        for new, old in OLD_NAMES[kind].items():
            tensors = {name.replace(f".model.{new}", f".model.{old}"): tensor for name, tensor in tensors.items()}
        save_file(tensors, path)
    planned = plan(folder, tmp_path / "out", lora=(Lora(one),))
    said = [line for line in planned.notices if line.startswith("--lora")]
    many = f"{others} matrices" if others > 1 else "1 matrix"
    assert said == [f"--lora {one}: it changes {many} of other parts than the text model: not read"]
    build.build(planned)
    wanted = expected(merged)
    assert same(Model.load(Bundle.open(tmp_path / "out")).forward(IDS.tolist(), 0, logits="all"), wanted)
    assert same(Reference(folder, adapters=[(one, 1.0)]).logits(IDS), wanted)


def test_an_adapter_of_other_parts_alone(tmp_path: Path) -> None:
    with_adapter(saved("qwen2_vl", tmp_path / "hf"), tmp_path / "adapter", r".*visual.*qkv")
    with pytest.raises(BadInput, match="changes only other parts than the text model"):
        plan(tmp_path / "hf", tmp_path / "out", lora=(Lora(tmp_path / "adapter"),))
