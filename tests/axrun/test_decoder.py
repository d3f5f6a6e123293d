"""Layers with their KV cache, compared with transformers: any prompt length, on rigid and flexible engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from axrun.decoder import Chunk, Decoder, chunks
from axrun.errors import BadInput, CheckFailed
from axrun.format.axmodel import TensorInfo
from axrun.format.bundle import Bundle
from axrun.model import Model, Post
from axrun.session import Array, Binding, Session, SessionGroup, StackedBinding, open_session
from tests.doctor.axmodels import sign

FOUR_GROUPS = [SessionGroup(i, *shape, (), ()) for i, shape in enumerate([(1, 255), (32, 0), (32, 32), (32, 128)])]


class Rigid:
    """An engine that runs only the exact shapes of its groups, like the NPU."""

    flexible = exact = stacks = False

    def __init__(self, session: Session) -> None:
        self.groups, self.window, self._session = session.groups, session.window, session

    def allocate(self, info: TensorInfo) -> Array:
        return self._session.allocate(info)

    def bind(self, group: int, arrays: Mapping[str, Array]) -> Binding:
        for info in self.groups[group].inputs:
            assert arrays[info.name].shape == info.shape, info
        return self._session.bind(group, arrays)

    def bind_stacked(self, arrays: Mapping[str, Array]) -> StackedBinding:
        raise ValueError("the NPU does not stack rows")


@pytest.fixture(scope="module")
def rigid(bundle_fp32: Path, engine: str) -> Model:
    model = Model.load(Bundle.open(bundle_fp32), engine)
    sessions = [Rigid(session) for session in model.decoder.sessions]
    post = Rigid(open_session(Bundle.open(bundle_fp32).post_path, engine))
    return Model(model.embedding, Decoder(sessions), Post(post))


@pytest.mark.parametrize(
    ("position", "count", "expected"),
    [
        (0, 1, [(0, 0, 1)]),
        (0, 2, [(1, 0, 2)]),
        (0, 32, [(1, 0, 32)]),
        (0, 33, [(1, 0, 32), (0, 32, 1)]),
        (0, 34, [(1, 0, 32), (2, 32, 2)]),
        (0, 70, [(1, 0, 32), (2, 32, 32), (3, 64, 6)]),
        (5, 30, [(2, 5, 30)]),
        (128, 40, [(3, 128, 32), *((0, 160 + i, 1) for i in range(8))]),  # no prefill group holds 160 rows
        (250, 5, [(0, 250 + i, 1) for i in range(5)]),
    ],
)
def test_chunks_use_the_group_with_the_smallest_sufficient_history(
    position: int, count: int, expected: list[tuple[int, int, int]]
) -> None:
    assert list(chunks(FOUR_GROUPS, position, count)) == [Chunk(*chunk) for chunk in expected]


@pytest.mark.parametrize(
    ("position", "count", "expected"),
    [
        (0, 70, [(1, 0, 32), (2, 32, 32), (3, 64, 6)]),
        (128, 40, [(3, 128, 32), (0, 160, 8)]),
        (150, 70, [(0, 150, 32), (0, 182, 32), (0, 214, 6)]),
        (254, 1, [(0, 254, 1)]),
    ],
)
def test_a_flexible_engine_prefills_after_any_history(
    position: int, count: int, expected: list[tuple[int, int, int]]
) -> None:
    assert list(chunks(FOUR_GROUPS, position, count, flexible=True)) == [Chunk(*chunk) for chunk in expected]


def test_without_prefill_groups_everything_decodes() -> None:
    assert [chunk.count for chunk in chunks(FOUR_GROUPS[:1], 3, 4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("length", [1, 2, 7, 31, 32, 33, 64, 65, 160, 161, 200, 255])
@pytest.mark.parametrize("shapes", ["flexible", "rigid"])
def test_a_prompt_of_any_length_gives_the_reference_logits(
    request: pytest.FixtureRequest,
    model_fp32: Model,
    heldout: list[int],
    heldout_logits: NDArray[np.float32],
    length: int,
    shapes: str,
) -> None:
    model = model_fp32 if shapes == "flexible" else request.getfixturevalue("rigid")
    logits = model.forward(heldout[:length], 0, logits="all")
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, heldout_logits[:length], rtol=0, atol=1e-4)
    np.testing.assert_allclose(model.forward(heldout[:length], 0), heldout_logits[length - 1], rtol=0, atol=1e-4)
    assert model.length == length


@pytest.mark.parametrize("cuts", [[1] * 40, [3, 40, 1, 1, 60, 2, 33], [100, 1, 1, 100]])
def test_the_chunking_does_not_matter(
    model_fp32: Model, heldout: list[int], heldout_logits: NDArray[np.float32], cuts: list[int]
) -> None:
    for count in cuts:
        at = model_fp32.length
        logits = model_fp32.forward(heldout[at : at + count])
        np.testing.assert_allclose(logits, heldout_logits[at + count - 1], rtol=0, atol=1e-4)


def test_a_rollback_replaces_the_old_rows(
    model_fp32: Model, heldout: list[int], heldout_logits: NDArray[np.float32]
) -> None:
    model_fp32.forward([1] * 200)
    model_fp32.forward(heldout[:50], 0)
    assert model_fp32.length == 50
    model_fp32.forward([2] * 40)
    model_fp32.decoder.cache.truncate(50)
    np.testing.assert_allclose(model_fp32.forward(heldout[50:60]), heldout_logits[59], rtol=0, atol=1e-4)


def test_a_nan_is_cleared_with_its_tokens(
    model_fp32: Model, heldout: list[int], heldout_logits: NDArray[np.float32]
) -> None:
    broken = np.full((20, 128), np.nan, np.float32)
    model_fp32.forward(heldout[:3])
    with pytest.raises(CheckFailed, match="layer 0 returned a value that is not finite in K_cache_out, at token 3"):
        model_fp32.decoder.forward(broken, 3)
    assert model_fp32.length == 3
    np.testing.assert_allclose(model_fp32.forward(heldout[3:6]), heldout_logits[5], rtol=0, atol=1e-4)
    model_fp32.decoder.cache.reset()
    np.testing.assert_allclose(model_fp32.forward(heldout[:3]), heldout_logits[2], rtol=0, atol=1e-4)


def test_a_single_layer_on_reference_hidden_states(bundle_fp32: Path, reference: Any, heldout: list[int]) -> None:
    with torch.inference_mode():
        states = reference(torch.tensor([heldout[:100]]), output_hidden_states=True).hidden_states
    decoder = Decoder([open_session(Bundle.open(bundle_fp32).layer_path(1))])
    prefill = decoder.forward(states[1][0, :99].numpy(), 0)
    decode = decoder.forward(states[1][0, 99:].numpy(), 99)
    np.testing.assert_allclose(np.concatenate([prefill, decode]), states[2][0].numpy(), rtol=0, atol=1e-4)


def test_s8_agrees_with_the_checkpoint(
    model_s8: Model, heldout: list[int], heldout_logits: NDArray[np.float32]
) -> None:
    logits = model_s8.forward(heldout, 0, logits="all").astype(np.float64)
    p, q = (values - np.log(np.exp(values).sum(axis=1, keepdims=True)) for values in (heldout_logits, logits))
    assert (heldout_logits.argmax(axis=1) == logits.argmax(axis=1)).mean() >= 0.99
    assert (np.exp(p) * (p - q)).sum(axis=1).mean() < 1e-3


def test_exceeding_the_context_is_an_error(model_fp32: Model, heldout: list[int]) -> None:
    model_fp32.forward(heldout)
    with pytest.raises(BadInput, match=r"256 tokens do not fit the context of 255 \(kv_cache_len\)\n.*--kv_cache_len"):
        model_fp32.forward([1])
    with pytest.raises(BadInput, match="300 tokens do not fit the context of 255"):
        model_fp32.forward([1] * 300, 0)
    assert model_fp32.length == 255


def test_a_gap_in_the_cache_is_refused(model_fp32: Model) -> None:
    with pytest.raises(ValueError, match="position 3 leaves a gap after the 0 tokens"):
        model_fp32.forward([1], 3)


def test_layers_of_different_bundles_do_not_mix(bundle_s8: Path, bundle_fp32: Path) -> None:
    sessions = [open_session(Bundle.open(path).layer_path(0)) for path in (bundle_s8, bundle_fp32)]
    with pytest.raises(BadInput, match="layer 1 has other shape groups or tensors than layer 0"):
        Decoder(sessions)


def test_a_post_model_is_not_a_layer(bundle_s8: Path) -> None:
    with pytest.raises(BadInput, match="layer 0 has no K_cache_out, V_cache_out, indices, mask"):
        Decoder([open_session(Bundle.open(bundle_s8).post_path)])


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "the prompt is empty"), ([5, 9999], "token id 9999 is outside the vocabulary of"), ([-1], "token id -1")],
)
def test_ids_outside_the_vocabulary_are_refused(model_fp32: Model, ids: list[int], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        model_fp32.forward(ids)


Edit = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize("wrong", ["embedding", "groups"])
def test_files_that_do_not_fit_the_manifest_are_refused(bundle_s8: Path, tmp_path: Path, wrong: str) -> None:
    import json
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(bundle_s8, folder)
    if wrong == "embedding":
        with (folder / "model.embed_tokens.weight.bfloat16.bin").open("ab") as file:
            file.write(b"\0")
        sign(folder, "model.embed_tokens.weight.bfloat16.bin")
        words = r"has 163841 bytes, expected 163840 \(640 x 128 bfloat16\)"
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["model"]["kv_cache_len"] = 1023
        (folder / "manifest.json").write_text(json.dumps(manifest))
        words = "the kv_cache_len of the axmodels is 255, the manifest says 1023"
    with pytest.raises(BadInput, match=words):
        Model.load(Bundle.open(folder))
