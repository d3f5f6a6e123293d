"""axc reference compared with transformers: its numbers, where it writes them, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from axc import build
from axc.logits import Options, _not_reached, _window_of, write
from axrun.doctor.figures import NAME as FIGURES
from axrun.errors import BadInput
from axrun.format import logits as reference_logits
from axrun.format.bundle import MANIFEST, verify
from axrun.format.logits import ReferenceLogits
from tests.axc.axc import assert_done, assert_refused, axc

WINDOW = 40


@pytest.fixture(scope="module")
def model(tiny_qwen2: Path) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def written(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferenceLogits:
    path = tmp_path_factory.mktemp("reference") / "new" / "tiny.npz"
    options = Options(tiny_qwen2, tiny_qwen2 / "heldout.txt", path, window=WINDOW, tokens=250, top_k=20)
    assert write(options)[0] == path
    return reference_logits.read(path)


@pytest.fixture
def bundle(bundle_s8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_s8, tmp_path / "bundle"))


def test_windows_hold_the_tokens_of_the_text(written: ReferenceLogits, tiny_qwen2: Path) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tiny_qwen2)
    ids = tokenizer((tiny_qwen2 / "heldout.txt").read_text())["input_ids"]
    assert written.tokens.shape == (6, WINDOW)
    assert written.tokens.reshape(-1).tolist() == ids[: 6 * WINDOW]


@torch.inference_mode()
def test_logits_match_transformers(written: ReferenceLogits, model: Any) -> None:
    expected = torch.log_softmax(model(torch.from_numpy(written.tokens.astype(np.int64))).logits.double(), dim=2)
    expected, following = expected[:, :-1], torch.from_numpy(written.tokens.astype(np.int64))[:, 1:, None]
    top = expected.topk(20, dim=2)
    torch.testing.assert_close(torch.from_numpy(written.logprobs.copy()).double(), top.values, atol=1e-4, rtol=0)
    assert (written.ids[..., 0] == top.indices[..., 0].numpy()).mean() > 0.999
    chosen = expected.gather(2, torch.from_numpy(written.ids.astype(np.int64)))
    torch.testing.assert_close(torch.from_numpy(written.logprobs.copy()).double(), chosen, atol=1e-4, rtol=0)
    rest = expected.scatter(2, torch.from_numpy(written.ids.astype(np.int64)), -torch.inf).logsumexp(2)
    torch.testing.assert_close(torch.from_numpy(written.rest.copy()).double(), rest, atol=1e-3, rtol=0)
    seen = expected.gather(2, following)[..., 0]
    torch.testing.assert_close(torch.from_numpy(written.following.copy()).double(), seen, atol=1e-4, rtol=0)


def test_the_continuations_are_greedy(written: ReferenceLogits, model: Any) -> None:
    assert written.prompt == WINDOW // 2
    assert written.continuations.shape == (6, WINDOW // 2)
    for number in (0, 2, 5):
        given = torch.from_numpy(written.tokens[number, : written.prompt].astype(np.int64))[None]
        out = model.generate(given, max_new_tokens=WINDOW // 2, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out[0, written.prompt :].tolist() == written.continuations[number].tolist()


def test_the_whole_vocabulary_leaves_no_rest(tiny_qwen2: Path, tmp_path: Path) -> None:
    options = Options(
        tiny_qwen2, tiny_qwen2 / "heldout.txt", tmp_path / "x", tokens=60, top_k=10**6, greedy_tokens=0, window=30
    )
    found = reference_logits.read(write(options)[0])
    assert found.exact
    assert np.isneginf(found.rest).all()
    assert found.continuations.shape == (0, 0)
    assert sorted(found.ids[0, 0].tolist()) == list(range(640))


def test_inputs_are_recorded_and_the_file_is_reproducible(tiny_qwen2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a board. " * 20)
    files = []
    for name in ("a", "b"):
        options = Options(tiny_qwen2, text, tmp_path / name, window=32, tokens=100, greedy_tokens=4)
        files.append(write(options)[0].read_bytes())
    assert files[0] == files[1]
    about = reference_logits.read(tmp_path / "a").about
    assert about["text"] == {"sha256": hashlib.sha256(text.read_bytes()).hexdigest(), "size": text.stat().st_size}
    weights = hashlib.sha256((tiny_qwen2 / "model.safetensors").read_bytes()).hexdigest()
    assert about["inputs"]["model.safetensors"] == weights
    assert str(tmp_path).encode() not in files[0]


def test_a_bundle_with_reference_logits_verifies(bundle: Path, tiny_qwen2: Path) -> None:
    text, few = tiny_qwen2 / "heldout.txt", ["--tokens", 800, "--greedy_tokens", 2]
    before = json.loads((bundle / MANIFEST).read_text())
    ended = axc("reference", "--input_path", tiny_qwen2, "--text", text, "--bundle", bundle, *few)
    assert_done(ended)
    assert "3 windows of 255 tokens" in ended.out
    assert "the 256 most likely tokens of each position are stored" in ended.out
    assert "figures.npz for axrun doctor: " in ended.out
    path = bundle / reference_logits.NAME
    size = path.stat().st_size
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": size}
    after = json.loads((bundle / MANIFEST).read_text())
    assert after["files"].pop(reference_logits.NAME) == entry
    figures = after["files"].pop(FIGURES)  # what `axrun doctor` is held against
    assert figures["size"] == (bundle / FIGURES).stat().st_size
    assert after == before
    assert_done(axc("verify", bundle))
    again = axc("reference", "--input_path", tiny_qwen2, "--text", text, "--bundle", bundle, *few, "--top_k", 9)
    assert_done(again)
    verify(bundle)
    assert path.stat().st_size < size


def test_a_build_recognises_the_bundle(bundle: Path, tiny_qwen2: Path) -> None:
    """The same build does not remove the reference."""
    options = build.Options(tiny_qwen2, bundle, prefill_len=32, kv_cache_len=255, last_kv_cache_len=(32, 128))
    write(Options(tiny_qwen2, tiny_qwen2 / "heldout.txt", bundle=bundle, tokens=300, window=100, greedy_tokens=0))
    build.build(build.plan(options))
    verify(bundle)
    assert (bundle / reference_logits.NAME).is_file()


def test_a_bundle_of_another_checkpoint_is_refused(bundle: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_qwen2, tmp_path / "other"))
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    with pytest.raises(
        BadInput, match=r"was not built from .*: its generation_config.json differs from the one in the manifest"
    ):
        write(Options(other, tiny_qwen2 / "heldout.txt", bundle=bundle))
    verify(bundle)


def test_windows_reach_every_group_of_the_bundle() -> None:
    groups = [{"tokens": 1, "history": 1023}, *({"tokens": 128, "history": n} for n in (0, 128, 256, 512, 896))]
    model = {"groups": groups, "prefill_len": 128, "kv_cache_len": 1023}
    assert _window_of(model) == 1023
    assert _window_of({**model, "groups": groups[:4], "kv_cache_len": 4095}) == 512
    assert _window_of({}) == 512
    assert not list(_not_reached(model, 1023))
    assert "do not reach the group behind 896 rows" in "".join(_not_reached(model, 512))
    assert "never leave the first prefill of 128" in "".join(_not_reached(model, 128))


def test_a_text_too_short_for_the_groups_gets_a_remark(bundle: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a board.")
    ended = axc("reference", "--input_path", tiny_qwen2, "--text", text, "--bundle", bundle, "--greedy_tokens", 0)
    assert_done(ended)
    assert "never leave the first prefill of 32" in ended.out


def test_a_bundle_of_another_config_json_is_refused(bundle: Path, tiny_qwen2: Path) -> None:
    """With --model_config at the build but not here, and vice versa."""
    options = Options(
        tiny_qwen2, tiny_qwen2 / "heldout.txt", bundle=bundle, model_config=tiny_qwen2 / "config.json", greedy_tokens=0
    )
    with pytest.raises(BadInput, match="the bundle was built without model_config"):
        write(options)


def test_a_folder_without_a_tokenizer_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_qwen2 / name, tmp_path / name)
    with pytest.raises(BadInput, match="has no tokenizer that transformers"):
        write(Options(tmp_path, tiny_qwen2 / "heldout.txt", tmp_path / "x"))


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (b"", [], "has 0 tokens"),
        (b"ab\xff", [], "is not UTF-8 at byte 2"),
        (None, [], "cannot read"),
        (b"Once upon a time", ["--window", 100], "expected at least --window 100"),
        (b"Once", ["--window", 1], "--window is 1"),
        (b"Once", ["--top_k", 0], "--top_k is 0"),
        (b"Once", ["--tokens", 1], "--tokens is 1"),
        (b"Once", ["--greedy_tokens", -1], "--greedy_tokens is -1"),
    ],
)
def test_unusable_options_are_refused(
    tiny_qwen2: Path, tmp_path: Path, content: bytes | None, flags: list[Any], words: str
) -> None:
    text, output = tmp_path / "text", tmp_path / "x.npz"
    if content is not None:
        text.write_bytes(content)
    assert_refused(axc("reference", "--input_path", tiny_qwen2, "--text", text, "--output_path", output, *flags), words)
    assert not output.exists()


def test_exactly_one_output_is_required(tiny_qwen2: Path, tmp_path: Path) -> None:
    for output, bundle in ((None, None), (tmp_path / "x", tmp_path)):
        with pytest.raises(BadInput, match="give one place"):
            Options(tiny_qwen2, tiny_qwen2 / "heldout.txt", output, bundle)
