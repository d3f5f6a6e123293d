"""LoRA adapters that peft saves: merged as peft merges them, into float and quantised bases, and by the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from axc import build, config, logits
from axc.checkpoints import Checkpoint, Lora, widen
from axc.doctor import case as doctor
from axc.doctor.case import Case
from axc.reference import Reference
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.model import Model
from tests.axc import quantised_files
from tests.axc.as_transformers import AUTO, IDS, SMALL, change_config, logits_of, plan, random_model, same
from tests.axc.axc import assert_done, assert_refused, llm_build
from tests.axc.quantised_files import FORMS

Adapter = Callable[..., Path]
TARGETS = ["q_proj", "v_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    random_model(transformers.AutoConfig.for_model("llama", **SMALL)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Adapter:
    """An adapter of random numbers, by peft."""

    def make(name: str = "adapter", seed: int = 0, folder: Path = base, **options: Any) -> Path:
        how = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})
        model = peft.get_peft_model(AUTO.from_pretrained(folder, dtype=torch.float32), how)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return make


def merged(base: Path, *adapters: tuple[Path, float]) -> Any:
    """peft's merge, in float32."""
    model = AUTO.from_pretrained(base, dtype=torch.float32)
    for folder, weight in adapters:
        with_adapter = peft.PeftModel.from_pretrained(model, folder)
        for module in with_adapter.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scale_layer(weight)
        model = with_adapter.merge_and_unload()
    return model.eval()


def values(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    return np.concatenate([widen(block, checkpoint.dtype(name)) for _, block in checkpoint.blocks(name)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {
            # the first that fits counts; a part of a name does not
            "rank_pattern": {"q_proj": 8, "^model.layers.1.mlp.down_proj": 2, "proj": 3},
            "alpha_pattern": {"down_proj": 5, "layers.0.mlp.down_proj": 7, "layers.0.self_attn.v_proj": 3},
        },
        {"target_modules": "all-linear", "init_lora_weights": "gaussian", "r": 16},
        {"layers_to_transform": [1], "exclude_modules": ["self_attn.v_proj"], "target_modules": ALL},
        {"target_modules": r".*\.1\..*(q|gate)_proj", "lora_alpha": -3},
    ],
    ids=["plain", "rslora", "patterns", "all", "some layers", "regular expression"],
)
def test_every_weight_is_as_peft_merges_it(
    base: Path, adapter: Adapter, tmp_path: Path, options: dict[str, Any]
) -> None:
    one, other = adapter(**options), adapter("other", seed=1)
    theirs = merged(base, (one, 1.0), (other, -0.5))
    ours = Checkpoint.open(base, (Lora(one), Lora(other, -0.5)))
    plain = Checkpoint.open(base)
    changed = 0
    for name, parameter in theirs.named_parameters():
        if name in ours.tensors:
            wanted, found = parameter.detach().numpy(), values(ours, name)
            assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max(), name
            assert np.array_equal(ours.finite_rows(name, 7, 20), ours.finite_rows(name, 0, 20)[7:])
            changed += not np.array_equal(found, values(plain, name))
    assert changed >= (2 if isinstance(options.get("target_modules"), str) else 6)
    reference = Reference(base, adapters=[(one, 1.0), (other, -0.5)])
    assert same(reference.logits(IDS), logits_of(theirs))
    assert "lora_reading" in reference.remarks[0]
    built = plan(base, tmp_path / "out", lora=(Lora(one), Lora(other, -0.5)))
    build.build(built)
    assert same(Model.load(Bundle.open(tmp_path / "out")).forward(IDS.tolist(), 0, logits="all"), logits_of(theirs))


def test_an_adapter_of_a_quantised_base(tmp_path: Path, adapter: Adapter) -> None:
    folder, output = tmp_path / "awq", tmp_path / "out"
    expected = quantised_files.write(folder, FORMS["awq"])
    float_base = tmp_path / "float"
    model = AUTO.from_config(Reference(folder).config, dtype=torch.float32)
    model.save_pretrained(float_base)
    one = adapter(folder=float_base, target_modules=["up_proj"])
    name = "model.layers.1.mlp.up_proj.weight"
    pairs = load_file(one / "adapter_model.safetensors")
    a, b = (pairs[f"base_model.model.{name[:-7]}.lora_{part}.weight"].double().numpy() for part in "AB")
    found = values(Checkpoint.open(folder, (Lora(one),)), name)
    assert np.allclose(found, expected[name] + 6 / 4 * b @ a, atol=1e-6)
    with pytest.raises(BadInput, match=r"up_proj\.qweight is stored as AWQ 4-bit with an adapter, which no"):
        plan(folder, output, weight_type=None, lora=(Lora(one),))
    notices = plan(folder, output, weight_type="s4", lora=(Lora(one),)).notices
    assert "12 matrices stored as AWQ 4-bit kept as s4: the same levels and scales" in notices
    assert any(note.startswith("2 matrices stored as AWQ 4-bit with an adapter dequantised, and") for note in notices)


def test_an_adapter_of_a_matrix_whose_rows_follow_another(tmp_path: Path, adapter: Adapter) -> None:
    """up is dequantised, and stored in the order of the columns of a down with desc_act."""
    folder, output = tmp_path / "gptq", tmp_path / "out"
    quantised_files.write(folder, FORMS["gptq-desc_act"])
    model = AUTO.from_config(Reference(folder).config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "float")
    one = adapter(folder=tmp_path / "float", target_modules=["up_proj"])
    build.build(plan(folder, output, weight_type="s8", lora=(Lora(one),)))
    seen = Model.load(Bundle.open(output)).forward(IDS.tolist(), 0, logits="all")
    wanted = Reference(folder, adapters=[(one, 1.0)]).logits(IDS)
    assert np.abs(seen - wanted).max() <= 0.03 * np.abs(wanted).max()


def test_the_commands_and_the_manifest(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    one, output = adapter(), tmp_path / "out"
    flags = ("--prefill_len", 16, "--kv_cache_len", 63, "--check_level", 1, "--lora", f"{one}:0.5")
    assert_done(llm_build(base, output, *flags))
    manifest = Bundle.open(output).manifest
    assert manifest["adapters"] == [{"weight": 0.5}]
    assert {"lora1/adapter_config.json", "lora1/adapter_model.safetensors"} <= manifest["inputs"].keys()
    how: dict[str, Any] = {"prefill_len": 16, "kv_cache_len": 63}
    assert not build.build(build.plan(build.Options(base, output, lora=(Lora(one, 0.5),), **how))).fresh
    with pytest.raises(BadInput, match=r"has adapters of weight 0\.5, this build 1\.0"):
        build.build(build.plan(build.Options(base, output, lora=(Lora(one),), **how)))
    case = Case(doctor.Options(output, base, lora=(Lora(one, 0.5),)))
    assert case.expect_same_model() is None
    assert case.changed_inputs == []
    with pytest.raises(BadInput, match=r"adapters of weight 0\.5, but --lora gives none\n.*--lora"):
        Case(doctor.Options(output, base)).expect_same_model()
    for wrong, said in (
        ((), "also built from 'lora1/adapter_config.json'"),
        ((Lora(one),), r"has adapters of weight 0\.5, --lora gives 1\.0"),
    ):
        with pytest.raises(BadInput, match=f"was not built from .*: the bundle .*{said}"):
            logits.write(logits.Options(base, base / "config.json", bundle=output, lora=wrong))
    data = bytearray((one / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (one / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(BadInput, match=r"lora1/adapter_model\.safetensors has changed since"):
        build.build(build.plan(build.Options(base, output, lora=(Lora(one, 0.5),), **how)))
    assert Case(doctor.Options(output, base, lora=(Lora(one, 0.5),))).changed_inputs == [
        "lora1/adapter_model.safetensors"
    ]


def test_the_bytes_do_not_depend_on_the_number_of_processes(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    one = Lora(adapter())
    first, second = (
        build.build(plan(base, tmp_path / str(n), weight_type="s8", parallel=n, lora=(one,))).manifest["files"]
        for n in (1, 2)
    )
    assert first == second


# Refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora True; DoRA is not supported"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']; only plain LoRA is supported"),
        ({"use_dora": 0}, "use_dora 0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"new_kind": 3}, "new_kind 3"),
        ({"r": 8}, "expected floats of rank 8"),
        ({"r": "4"}, "r '4'"),
        ({"r": 0}, "r 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern {'q_proj': 0}"),
        ({"lora_alpha": 1e300}, "scaled by 2.5e+299, too large"),
        ({"target_modules": [3]}, "target_modules [3]"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform ['1']"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": True}, "lora_alpha True"),
        ({"rank_pattern": {"(a+)+$": 2}}, "of patterns only plain names"),
        ({"alpha_pattern": [3]}, "alpha_pattern [3]"),
        ({"use_rslora": "yes"}, "use_rslora 'yes'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_plain_adapter(base: Path, adapter: Adapter, changes: dict[str, Any], words: str) -> None:
    one = adapter()
    path = one / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(BadInput) as refused:
        Checkpoint.open(base, (Lora(one),))
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 2


def _changed_config(folder: Path, **changes: Any) -> Lora:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Lora(folder)


def test_what_is_said_of_an_adapter(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    """Matrices that peft would look for, no change at all, another base; nothing of a usual one."""

    def said(one: Lora) -> list[str]:
        checkpoint = Checkpoint.open(base, (one,))
        assert config.load(checkpoint).num_hidden_layers == 2
        return checkpoint.lora_remarks()

    one = adapter()
    assert said(Lora(one)) == []
    path = one / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.0" not in name or "q_proj" in name}, path)
    for targets, missing in ((TARGETS, "2 more that target_modules names"), (".*", "2 more that other layers have")):
        (line,) = said(_changed_config(one, target_modules=targets))
        assert f"it changes 4 matrices, and not {missing} (model.layers.0." in line
    save_file(tensors, path)
    (line,) = said(_changed_config(one, target_modules=TARGETS, lora_alpha=0))
    assert line.endswith("it changes nothing: all its products are 0")
    save_file({name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, path)
    assert said(_changed_config(one, lora_alpha=6)) == [line]
    save_file(tensors, path)
    (line,) = said(_changed_config(one, base_model_name_or_path="meta-llama/Llama-3.2-1B"))
    assert line.endswith(f"trained on 'meta-llama/Llama-3.2-1B'; that this is {base} is not checked: shapes alone fit")
    change_config(base, {"_name_or_path": "meta-llama/Llama-3.2-1B"})
    try:
        assert said(Lora(one)) == []
    finally:
        change_config(base, {}, ("_name_or_path",))


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {name: tensor for name, tensor in tensors.items() if name != B}, "lacks base_model"),
        (lambda tensors: {**tensors, "x.lora_magnitude_vector": tensors[A][0].clone()}, "has x.lora_magnitude_vector"),
        (lambda tensors: {**tensors, A: tensors[A][:, :5].contiguous()}, "[64, 5]; the base has [64, 64]"),
        (lambda tensors: {**tensors, A: tensors[A].to(torch.int8)}, "A I8[4, 64]"),
        (lambda tensors: {**tensors, A: tensors[A][0].clone()}, "expected floats of rank 4"),
        (lambda tensors: {**tensors, B: tensors[B] * torch.inf}, "a value that is not finite"),
        (
            lambda tensors: {name.replace("q_proj", "r_proj"): tensor for name, tensor in tensors.items()},
            "which target_modules of adapter_config.json does not name",
        ),
        (
            lambda tensors: {name.replace("layers.0.", "layers.7."): tensor for name, tensor in tensors.items()},
            "the base has none",
        ),
        (
            lambda tensors: {
                **tensors,
                **{name.replace("model.model", "model"): tensors[name].clone() for name in (A, B)},
            },
            "changes model.layers.0.self_attn.q_proj.weight twice",
        ),
        (lambda tensors: {"x": tensors[A]}, "has x"),
        (
            lambda tensors: {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
            ".lora_A.weight, which does not begin with base_model.model.: peft ignores it",
        ),
    ],
    ids=[
        "alone",
        "dora",
        "shape",
        "integers",
        "vector",
        "infinite",
        "no target",
        "no such layer",
        "twice",
        "other names",
        "no prefix",
    ],
)
def test_tensors_that_do_not_fit(base: Path, adapter: Adapter, change: Callable[..., Any], words: str) -> None:
    one = adapter()
    path = one / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(BadInput) as refused:
        Checkpoint.open(base, (Lora(one),))
    assert words in str(refused.value)


@pytest.mark.parametrize("copied", [False, True], ids=["stored once", "stored twice"])
def test_a_head_tied_to_the_embedding(adapter: Adapter, tmp_path: Path, copied: bool) -> None:
    """With the adapter beside the model only the head changes; once peft has merged it, the embedding too."""
    tied, folder = tmp_path / "tied", tmp_path / "own"
    model = random_model(transformers.AutoConfig.for_model("llama", **{**SMALL, "tie_word_embeddings": True}))
    model.save_pretrained(tied)
    tensors = load_file(tied / "model.safetensors")
    with_head = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    if copied:
        save_file(with_head, tied / "model.safetensors", {"format": "pt"})
    one = adapter(folder=tied, target_modules=["lm_head", "q_proj"])
    pairs = load_file(one / "adapter_model.safetensors")
    save_file({name: pair for name, pair in pairs.items() if ".lora_" in name}, one / "adapter_model.safetensors")
    embedding = merged(tied, (one, 1.0)).get_input_embeddings().weight
    assert not torch.equal(embedding, model.get_input_embeddings().weight)
    with pytest.raises(BadInput, match=r"lm_head, which the base ties to its embedding: .*\nGive a base"):
        plan(tied, tmp_path / "out", lora=(Lora(one),))
    shutil.copytree(tied, folder)  # as the message advises
    save_file(with_head, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, {"tie_word_embeddings": False})
    beside = peft.PeftModel.from_pretrained(AUTO.from_pretrained(tied, dtype=torch.float32), one).eval()
    build.build(plan(folder, tmp_path / "out", lora=(Lora(one),)))
    seen = Model.load(Bundle.open(tmp_path / "out")).forward(IDS.tolist(), 0, logits="all")
    assert same(seen, logits_of(beside))
    assert same(seen, logits_of(merged(folder, (one, 1.0))))


def test_folders_and_weights(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    one = adapter()
    assert Lora.parse(f"{one}:0.25") == Lora(one, 0.25)
    assert Lora.parse(str(one)) == Lora(one)
    with_colon = one.rename(tmp_path / "a:2")
    assert Lora.parse(str(with_colon)) == Lora(with_colon)
    for text in (f"{one}:half", f"{one}:nan", ":2"):
        assert_refused(llm_build(base, tmp_path / "out", "--lora", text), "expected DIR or DIR:WEIGHT")
    missing = ("adapter_config.json is missing", "peft adapter as --lora")
    assert_refused(llm_build(base, tmp_path / "out", "--lora", tmp_path / "none"), *missing)
    with pytest.raises(BadInput, match="is given twice"):
        Checkpoint.open(base, (Lora(with_colon), Lora(with_colon, 0.5)))
    (with_colon / "adapter_model.safetensors").rename(with_colon / "adapter_model.bin")
    with pytest.raises(BadInput, match="a pickle, and not read"):
        Checkpoint.open(base, (Lora(with_colon),))
