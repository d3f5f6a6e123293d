"""models/*.toml: the repository's models, and the errors for invalid files."""

from __future__ import annotations

from pathlib import Path

import pytest

from axc.models import MODELS, Hub, Shipped, find_model, load_model
from axrun.errors import BadInput

TOML = """
[source]
{source}
[build]
chip = "AX650"
weight_type = "s8"
hidden_state_type = "bf16"
prefill_len = 64
kv_cache_len = 255
{build}
[check]
prompt = "1+1="
"""
SHIPPED = 'path = "models/toy"'
PINNED = """
repo = "owner/name"
revision = "0123456789012345678901234567890123456789"
files = {{ {files} }}
"""


def write(folder: Path, source: str = SHIPPED, build: str = "") -> Path:
    (folder / "toy.toml").write_text(TOML.format(source=source, build=build))
    return folder


@pytest.mark.parametrize("name", sorted(file.stem for file in MODELS.glob("*.toml")))
def test_every_model_of_the_repository_loads_and_its_groups_fit_its_cache(name: str) -> None:
    model = load_model(name)
    assert model.prompt
    for history in model.build.last_kv_cache_len:
        assert history % model.build.prefill_len == 0
        assert history + model.build.prefill_len <= model.build.kv_cache_len + 1
    if isinstance(model.source, Shipped):
        assert (model.source.path / "config.json").is_file()
    else:
        needed = {"config.json", "model.safetensors", "tokenizer.json"}
        pins = model.source.files if isinstance(model.source, Hub) else ()
        assert not pins or needed <= {pin.name for pin in pins}
        said = "Not pinned here" in (MODELS / f"{name}.toml").read_text()
        assert said == (isinstance(model.source, Hub) and not pins)


def test_defaults_become_the_flags_of_llm_build(tmp_path: Path) -> None:
    model = load_model("toy", write(tmp_path, build="last_kv_cache_len = [64, 128]\npost_topk = 5"))
    assert model.build.flags() == [
        *("--chip", "AX650", "--weight_type", "s8", "--hidden_state_type", "bf16"),
        *("--prefill_len", "64", "--kv_cache_len", "255"),
        *("--last_kv_cache_len", "64", "--last_kv_cache_len", "128", "--post_topk", "5"),
    ]


def test_a_pinned_calibration(tmp_path: Path) -> None:
    said = f'calibrated = "toy.safetensors"\ncalibrated_sha256 = "{"a" * 64}"'
    model = load_model("toy", write(tmp_path, build=said))
    assert model.build.flags()[-4:] == [
        *("--calibrated", str(tmp_path / "toy.safetensors"), "--calibrated_sha256", "a" * 64)
    ]
    assert model.build.calibration == ("calibrated", "calibrated_sha256")
    model = load_model("toy", write(tmp_path, build='quantizer = "gptq"\nbits = 5.5'))
    assert model.build.flags()[-4:] == ["--quantizer", "gptq", "--bits", "5.5"]
    assert "bits" not in model.build.given()


def test_a_pinned_source(tmp_path: Path) -> None:
    source = PINNED.format(files=f'"a.json" = {{ size = 3, git_blob = "{"a" * 40}" }}')
    hub = load_model("toy", write(tmp_path, source)).source
    assert isinstance(hub, Hub)
    assert [(pin.name, pin.size, pin.git_blob, pin.sha256) for pin in hub.files] == [("a.json", 3, "a" * 40, None)]


@pytest.mark.parametrize("asked", ["qwen2-0.5", "Qwen2-0.5B", "qwen2_0.5b"])
def test_an_unknown_model_lists_the_known_ones_and_the_nearest(asked: str) -> None:
    with pytest.raises(BadInput, match=r"(?s)qwen2-0\.5b, .*tiny-qwen2 \(did you mean qwen2-0\.5b\?\)"):
        load_model(asked)


def test_check_levels(tmp_path: Path) -> None:
    assert load_model("tiny-qwen2").check_level == 2
    assert load_model("minicpm4-0.5b").check_level == 0
    toml = write(tmp_path) / "toy.toml"
    toml.write_text(toml.read_text() + "levle = 0\n")
    with pytest.raises(BadInput, match="'levle' is not known here: prompt, level"):
        load_model("toy", tmp_path)


def test_a_model_name_is_not_a_path() -> None:
    with pytest.raises(BadInput, match="no model is named"):
        load_model("../models/tiny-qwen2")
    with pytest.raises(BadInput, match=r"(?s)MODEL=models/tiny-qwen2 is a path here.*--input_path models/tiny-qwen2"):
        find_model("models/tiny-qwen2")


def test_a_repository_without_a_toml(tmp_path: Path) -> None:
    model = find_model("Some.One/A_model-1.5B")
    assert (model.name, model.asked) == ("Some.One--A_model-1.5B", "Some.One/A_model-1.5B")
    assert model.source == Hub("Some.One/A_model-1.5B", "main", ())
    assert "--weight_type" not in model.build.flags()  # as it is quantised already
    assert load_model("toy", write(tmp_path, 'repo = "a/b"')).source == Hub("a/b", "main", ())


@pytest.mark.parametrize(
    "name",
    ["../up", "a/..", "./a", "/etc", "a/", "a/b/c", "a b/c", "a/b\n", "-a/b", "a/-b", ".a/b", "a/b.git", "a--b/c",
     "a/b..c", "a/b.", "é/b", "a\\b/c", "a/" + 96 * "b"],
)  # fmt: skip
def test_invalid_repository_names_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"is no repository of the Hub: expected owner/name|is a path here"):
        find_model(name)


@pytest.mark.parametrize(
    ("source", "build", "said"),
    [
        (SHIPPED, "weight_tpye = 's4'", "'weight_tpye' is not known here: chip"),
        (SHIPPED, "post_topk = true", "'post_topk' is True: int is expected"),
        (SHIPPED, "last_kv_cache_len = ['64']", "whole numbers"),
        (SHIPPED, "prefill_len = 1", "Cannot overwrite"),
        (SHIPPED, "calibrated = 'a.safetensors'", "a.safetensors has no digest"),
        ("", "", "'repo' is missing"),
        (PINNED.format(files='"a" = { size = 3 }'), "", "a has no digest"),
        (PINNED.format(files='"../a" = { sha256 = "' + "a" * 64 + '" }'), "", "not a file name inside"),
        (PINNED.format(files='"a" = { sha256 = "a" }'), "", "not 64 lower-case hex digits"),
        (PINNED.format(files="").replace("0123456789" * 4, "main"), "", "a revision is a full commit id"),
        ('repo = "a/b"\nrevision = "v1"', "", "a/b at 'v1': a revision is a full commit id"),
        ('repo = "a/../b"', "", "'a/../b' is no repository"),
    ],
)
def test_an_invalid_file_is_named_with_its_error(tmp_path: Path, source: str, build: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        load_model("toy", write(tmp_path, source, build))
    assert str(error.value).startswith(str(tmp_path / "toy.toml"))
    assert said in str(error.value)
