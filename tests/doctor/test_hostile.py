"""Invalid inputs: one clear error without traceback, or a report as one JSON object; nothing else on stdout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import axc.cli
import axrun.cli
from axrun.doctor import bounds, figures
from axrun.format import npz
from tests import vendor_files
from tests.doctor import axmodels, checkpoints, text_faults
from tests.doctor.conftest import Base, Doctor

BAD_INPUT, FAULTY = 2, 1
Copy = Callable[[str], tuple[Path, Path]]
Ended = tuple[int, str, str]
Run = Callable[..., Ended]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Run:
    """axc doctor in this process: exit code, stdout, stderr."""

    def run(bundle: Path, checkpoint: Path, *flags: str) -> Ended:
        capsys.readouterr()
        code = axc.cli.main(["doctor", str(bundle), "--checkpoint", str(checkpoint), "--json", *flags])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def alone(capsys: pytest.CaptureFixture[str]) -> Run:
    """axrun doctor in this process."""

    def run(bundle: Path, *flags: str) -> Ended:
        capsys.readouterr()
        code = axrun.cli.main(["doctor", str(bundle), "--json", *flags])
        return (code, *capsys.readouterr())

    return run


def refused(ended: Ended, *words: str) -> None:
    """Checks for one error of one to three lines, with exit code 2."""
    code, out, err = ended
    assert (code, out) == (BAD_INPUT, ""), ended
    assert "Traceback" not in err, err
    errors = err[err.index("error: ") :].splitlines()
    assert 1 <= len(errors) <= 3, err
    assert all(word in err for word in words), err


def one_object(ended: Ended) -> dict[str, Any]:
    """The report on stdout, whatever the verdict."""
    code, out, err = ended
    assert "Traceback" not in err, err
    report = json.loads(out)
    assert isinstance(report, dict)
    assert code == (FAULTY if report["verdict"] == "faulty" else 0)
    assert bool(report["finding"]) == (code == FAULTY)
    return report


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file"])
def test_no_bundle(what: str, tiny_qwen2: Path, tmp_path: Path, doctor: Run, alone: Run) -> None:
    place = tmp_path / "place"
    if what == "an empty folder":
        place.mkdir()
    elif what == "a file":
        place.write_text("{}")
    refused(doctor(place, tiny_qwen2), str(place))
    refused(alone(place), str(place))


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file", "no weights", "no config", "config"])
def test_no_checkpoint(what: str, base: Base, tiny_qwen2: Path, tmp_path: Path, doctor: Run) -> None:
    place = tmp_path / "place"
    if what == "an empty folder":
        place.mkdir()
    elif what == "a file":
        place.write_text("{}")
    elif what != "nothing":
        shutil.copytree(tiny_qwen2, place)
        if what == "no weights":
            (place / "model.safetensors").unlink()
        elif what == "no config":
            (place / "config.json").unlink()
        else:
            (place / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 1e400}')
    refused(doctor(base("s8")[0], place), str(place))


def test_the_weights_are_cut_short(base: Base, tiny_qwen2: Path, tmp_path: Path, doctor: Run) -> None:
    place = Path(shutil.copytree(tiny_qwen2, tmp_path / "place"))
    content = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(content[:-1000])
    refused(doctor(base("s8")[0], place), str(place))


def test_a_byte_order_mark(base: Base, tiny_qwen2: Path, tmp_path: Path, doctor: Run) -> None:
    """The runner reads such a file, but transformers does not, so there is no reference."""
    place = Path(shutil.copytree(tiny_qwen2, tmp_path / "place"))
    path = place / "tokenizer_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    refused(doctor(base("s8")[0], place), str(place), "tokenizer_config.json begins with a byte order mark")


def test_the_checkpoint_of_another_model(base: Base, llama: Path, doctor: Run) -> None:
    """The bundle may be right: the error names both."""
    refused(doctor(base("s8")[0], llama), str(llama), "another")


def test_a_checkpoint_of_the_same_shapes(base: Base, tiny_qwen2: Path, tmp_path: Path, doctor: Run) -> None:
    """Another checkpoint of the same architecture: the finding says that the files differ from the manifest's."""
    config = json.loads((tiny_qwen2 / "config.json").read_text())
    other = checkpoints.with_text(checkpoints.save(tmp_path / "other", config), tiny_qwen2)
    code, _, err = ended = doctor(base("s8")[0], other)
    if code == BAD_INPUT:
        refused(ended, "other")
    else:
        finding = one_object(ended)["finding"]
        assert "manifest" in " ".join(finding.values()), (finding, err)


def test_a_bundle_as_the_vendors_compiler_makes(copy: Copy, doctor: Run, alone: Run) -> None:
    """Its axmodels need an NPU, which this machine lacks: stages that did not run are not reported as healthy."""
    bundle, checkpoint = copy("s8")
    content = vendor_files.encode(vendor_files.ROWS["4.1"], vendor_files.extra_data(vendor_files.ROWS["4.1"], 0))
    for path in bundle.glob("*.axmodel"):
        axmodels.rewrite(path, content)
        axmodels.sign(bundle, path.name)
    axmodels.manifest(bundle, lambda values: values.update(maker="pulsar2"))
    for ended in (doctor(bundle, checkpoint), alone(bundle)):
        assert one_object(ended)["verdict"] != "healthy"


def test_one_of_the_vendors_among_ours(copy: Copy, doctor: Run) -> None:
    bundle, checkpoint = copy("s8")
    content = vendor_files.encode(vendor_files.ROWS["4.1"], vendor_files.extra_data(vendor_files.ROWS["4.1"], 0))
    axmodels.replace(bundle, axmodels.layer(bundle, 1), content)
    report = one_object(doctor(bundle, checkpoint))
    assert report["finding"]["file"] == axmodels.layer(bundle, 1)


DAMAGES: dict[str, bytes] = {
    "no JSON": b"{",
    "no object": b"[]",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100000,
    "a huge number": b'{"schema": 1e999}',
    "a long number": b'{"schema": ' + b"9" * 5000 + b"}",
    "nothing": b"",
    "null": b"null",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["manifest.json", "hf/tokenizer.json", "hf/tokenizer_config.json", "hf/config.json", "post_config.json"]
)
def test_json_that_is_damaged(name: str, damage: str, copy: Copy, doctor: Run, alone: Run) -> None:
    bundle, checkpoint = copy("s8")
    axmodels.rewrite(bundle / name, DAMAGES[damage])
    if name != "manifest.json":
        axmodels.sign(bundle, name)
    for ended in (doctor(bundle, checkpoint), alone(bundle)):
        if ended[0] == BAD_INPUT:
            refused(ended, name.rpartition("/")[2])
        else:
            report = one_object(ended)
            if damage != "a huge number" or name == "manifest.json":
                assert report["finding"]["file"] == name, report


HUGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "layers": lambda values: values["model"].update(layers=10**9),
    "vocabulary": lambda values: values["model"].update(vocab_size=1 << 62),
    "hidden size": lambda values: values["model"].update(hidden_size=1 << 40),
    "context": lambda values: values["model"].update(kv_cache_len=1 << 40),
    "groups": lambda values: values["model"].update(groups=[{"tokens": 1 << 23, "history": 1 << 23}]),
    "negative": lambda values: values["model"].update(kv_cache_len=-5),
    "a path": lambda values: values["model"].update(post_file="../../../etc/passwd"),
    "a type": lambda values: values["model"].update(layers="four"),
    "sizes": lambda values: values["files"]["post_config.json"].update(size=1 << 70),
    "memory": lambda values: values["memory"].update(axmodels=10**30),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_manifest_of_odd_numbers(what: str, copy: Copy, doctor: Run, alone: Run) -> None:
    bundle, checkpoint = copy("s8")
    axmodels.manifest(bundle, HUGE[what])  # type: ignore[arg-type]
    for ended in (doctor(bundle, checkpoint), alone(bundle)):
        if ended[0] == BAD_INPUT:
            refused(ended)
        else:
            assert one_object(ended)["verdict"] == "faulty" or what == "memory"


def test_figures_that_are_damaged(copy: Copy, alone: Run) -> None:
    """figures.npz is validated like any other file of the bundle."""
    bundle, _ = copy("s8")
    name = next(path.name for path in sorted(bundle.glob("*.npz")) if "figures" in path.name)
    content = (bundle / name).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"PK\x03\x04" + b"\x00" * 100, content[:200] + content[300:]):
        axmodels.replace(bundle, name, damaged)
        ended = alone(bundle)
        if ended[0] == BAD_INPUT:
            refused(ended, name)
        else:
            report = one_object(ended)
            assert report["finding"]["file"] == name, report


Arrays = dict[str, Any]
CHANGED: dict[str, Callable[[Arrays], object]] = {
    "many visits": lambda arrays: arrays.update(visits=np.concatenate([arrays["visits"]] * 2000)),
    "no row of logits": lambda arrays: arrays.update({name: arrays[name][:0] for name in arrays if "post_" in name}),
    "nothing is added": lambda arrays: arrays.update(updates_scale=arrays["updates_scale"] * 0),
    "another K": lambda arrays: arrays.update(new_keys_scale=arrays["new_keys_scale"] * 2),
}


@pytest.mark.parametrize("what", CHANGED)
def test_figures_that_were_changed(what: str, copy: Copy, alone: Run) -> None:
    """The figures are reported as damaged, not the axmodels that differ from them."""
    bundle, _ = copy("s8")
    arrays, about = npz.read(bundle / figures.NAME, figures.ARRAYS, figures.SCHEMA)
    CHANGED[what](arrays)
    if what != "another K":
        about.pop("sums")
    axmodels.replace(bundle, figures.NAME, npz.encode(arrays, about))
    report = one_object(alone(bundle))
    assert report["finding"]["file"] == figures.NAME, report


@pytest.mark.parametrize(
    "source",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 2000000000 }}"],
)
def test_a_template_that_takes_too_much(
    source: str, copy: Copy, doctor: Run, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped and reported."""
    monkeypatch.setattr(bounds, "SECONDS", 0.5)
    bundle, checkpoint = copy("s8")
    text_faults.in_json(
        text_faults.SETTINGS, lambda values: values.update(chat_template=source + values["chat_template"])
    )(bundle, checkpoint)
    for ended in (doctor(bundle, checkpoint), alone(bundle)):
        finding = one_object(ended)["finding"]
        assert finding["file"] == text_faults.SETTINGS, finding
        assert "template" in finding["part"] + finding["cause"], finding


def changed(name: str, change: Callable[[Path], object]) -> Any:
    return pytest.param(name, change, id=name)


def config(**values: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def not_a_number(path: Path) -> None:
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(weights, path, metadata={"format": "pt"})


def a_word(path: Path) -> None:
    path.write_text(path.read_text().replace("helpful", "wise"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        changed("config.json", config(rms_norm_eps=1e-5)),
        changed("model.safetensors", not_a_number),
        changed("tokenizer_config.json", a_word),
    ],
)
def test_a_checkpoint_that_changed_after_the_build(
    name: str, change: Callable[[Path], object], copy: Copy, tmp_path: Path, doctor: Run
) -> None:
    """The finding names the checkpoint file, not the unchanged file of the bundle."""
    bundle, checkpoint = copy("s8")
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    change(other / name)
    report = one_object(doctor(bundle, other))
    assert name in report["stages"][0]["text"], report
    assert report["finding"]["file"] == str(other / name), report
    assert f"{name} of the checkpoint changed" in report["finding"]["cause"], report


def test_no_figures(copy: Copy, alone: Run) -> None:
    """The verdict is undecided, and the report says how to store figures."""
    bundle, _ = copy("s8")
    for path in bundle.glob("*.npz"):
        path.unlink()
        axmodels.manifest(bundle, lambda values, name=path.name: values["files"].pop(name))  # type: ignore[misc]
    report = one_object(alone(bundle))
    assert report["verdict"] == "undecided"
    assert any("axc reference" in each["text"] for each in report["stages"])


def test_a_bundle_without_a_tokenizer(tiny_qwen2: Path, tmp_path: Path, axc_doctor: Doctor) -> None:
    """No fault, because the checkpoint has none either."""
    from axc import build

    checkpoint = checkpoints.save(tmp_path / "checkpoint", {"model_type": "llama"})
    build.build(build.plan(build.Options(checkpoint, tmp_path / "bundle", prefill_len=16, kv_cache_len=63)))
    said = axc_doctor(tmp_path / "bundle", checkpoint)
    assert said.code == 0, said
