"""Embeddings of a small Qwen3-Embedding checkpoint, against transformers and sentence-transformers in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from axrun.cli import main
from axrun.embeddings import Embedded, Texts, embed
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.load import Loading
from axrun.text.tokenizer import Tokenizer
from requirements.install import install_sentence_transformers
from tests import embedding_models
from tests.conftest import Builder
from tests.embedding_models import FP32

SCRIPT = Path(__file__).with_name("sentence_embeddings.py")
TEXTS = ["hello", "1+1=", "A longer text, " * 12, embedding_models.QUERY + "why?", " ", "caf\u00e9 \u4e2d"]
KINDS = [("lasttoken", True), ("mean", True), ("mean", False)]
NAMES = ["-".join([mode, *(["normalize"] if normalize else [])]) for mode, normalize in KINDS]


@pytest.fixture(scope="module")
def made(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A checkpoint of each kind, and its bundle."""
    found = {}
    for name, kind in zip(NAMES, KINDS, strict=True):
        checkpoint = embedding_models.write(tmp_path_factory.mktemp(name) / "checkpoint", tiny_qwen2, *kind)
        found[name] = checkpoint, embedding_models.build_fp32(checkpoint, checkpoint.with_name("bundle"))
    return found


def by_transformers(checkpoint: Path, texts: list[str]) -> NDArray[np.float32]:
    """Pooled by the rules of sentence-transformers' Pooling and Normalize, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    last = json.loads((checkpoint / "1_Pooling" / "config.json").read_text())["pooling_mode_lasttoken"]
    normalize = len(json.loads((checkpoint / "modules.json").read_text())) == 3
    found = []
    for text in texts:
        with torch.no_grad():
            (states,) = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        pooled = states[-1] if last else states.mean(0)
        found.append(torch.nn.functional.normalize(pooled, dim=0) if normalize else pooled)
    return torch.stack(found).numpy()


def distances(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine distances of the rows."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray(1 - (one * other).sum(1) / lengths)


@pytest.mark.parametrize("engine", ["ax", "ort"])
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_those_of_the_checkpoint(made: dict[str, tuple[Path, Path]], name: str, engine: str) -> None:
    checkpoint, bundle = made[name]
    seen, wanted = embed(bundle, TEXTS, loading=Loading(engine=engine)), by_transformers(checkpoint, TEXTS)
    assert distances(seen.vectors, wanted).max() < 1e-8
    np.testing.assert_allclose(seen.vectors, wanted, atol=2e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert seen.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)


@pytest.mark.system
def test_embeddings_are_those_of_sentence_transformers(made: dict[str, tuple[Path, Path]]) -> None:
    """It reads modules.json and 1_Pooling by itself, and pads the texts of a batch."""
    python = install_sentence_transformers(Path(sys.prefix))
    command = [str(python), "-I", str(SCRIPT), json.dumps(TEXTS), *(str(checkpoint) for checkpoint, _ in made.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for (_, bundle), listed in zip(made.values(), json.loads(done.stdout.splitlines()[-1]), strict=True):
        seen, wanted = embed(bundle, TEXTS).vectors, np.array(listed)
        assert distances(seen, wanted).max() < 1e-8
        np.testing.assert_allclose(seen, wanted, atol=2e-4)


class TestLastToken:
    """Of the first kind of checkpoint, and of a bundle that is not for embeddings alone."""

    @pytest.fixture
    def checkpoint(self, embedding_checkpoint: Path) -> Path:
        return embedding_checkpoint

    @pytest.fixture
    def bundle(self, embedding_bundle: Path) -> Path:
        return embedding_bundle

    def test_the_manifest_says_how(self, bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert manifest["pooling"] == {"mode": "lasttoken", "normalize": True, "max_tokens": None}
        assert manifest["flags"]["ret_postnorm"] is True
        assert {"modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"} < set(manifest["inputs"])

    def test_an_identical_bundle_is_kept(self, checkpoint: Path, bundle: Path) -> None:
        before = (bundle / "manifest.json").stat().st_mtime_ns
        embedding_models.build_fp32(checkpoint, bundle)
        assert (bundle / "manifest.json").stat().st_mtime_ns == before

    def test_dimensions_are_the_first_ones_normalised_again(self, bundle: Path) -> None:
        whole, cut = embed(bundle, ["hello"]).vectors[0], embed(bundle, ["hello"], dimensions=5).vectors[0]
        np.testing.assert_allclose(cut, whole[:5] / np.linalg.norm(whole[:5]), rtol=1e-6)

    @pytest.mark.parametrize(
        ("dimensions", "words"), [(0, "dimensions is 0; expected 1 to 64"), (65, "is 65; expected")]
    )
    def test_dimensions_out_of_range(self, bundle: Path, dimensions: int, words: str) -> None:
        with pytest.raises(BadInput, match=words):
            embed(bundle, ["hello"], dimensions)

    def test_a_text_that_is_too_long(self, checkpoint: Path, bundle: Path) -> None:
        """It is cut as transformers cuts it: the end token stays."""
        text = "a b c d " * 100
        with pytest.raises(BadInput, match="tokens, and this model's limit is 255; shorten it or truncate"):
            embed(bundle, [text])
        opened = Bundle.open(bundle)
        tokenizer = Tokenizer.open(opened.hf)
        ids = Texts.of(opened, tokenizer).ids(text, truncate=True)
        theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
        assert ids == theirs(text, truncation=True, max_length=255)["input_ids"]
        assert len(ids) == 255
        assert Texts.of(opened, tokenizer).ids(ids + ids, truncate=True) == ids

    def test_prompts_after_each_other_reuse_nothing_wrong(self, bundle: Path) -> None:
        texts = ["the same beginning, one end", "the same beginning, another end", "the same beginning"]
        together = embed(bundle, texts).vectors
        for text, vector in zip(texts, together, strict=True):
            assert np.array_equal(embed(bundle, [text]).vectors[0], vector)

    def test_the_command(self, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        wanted = embed(bundle, ["a", "b"])
        flags = ["embed", str(bundle), "--text", "a", "--text", "b"]
        assert main([*flags, "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["prompt_tokens"] == wanted.tokens
        assert np.array_equal(np.array(made["embeddings"], np.float32), wanted.vectors)
        assert main(flags) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [json.loads(line) for line in lines] == made["embeddings"]

    @pytest.mark.parametrize("command", [["run", "--prompt", "x"], ["chat"]])
    def test_it_does_not_answer(self, bundle: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main([command[0], str(bundle), *command[1:]]) == 2
        assert f"{bundle} makes embeddings, not text; use `axrun embed`" in capsys.readouterr().err

    def test_a_bundle_without_hidden_states(self, bundle_s8: Path) -> None:
        with pytest.raises(BadInput, match=r"/tiny makes no embeddings: .*\nBuild it again with --ret_postnorm"):
            embed(bundle_s8, ["x"])

    def test_any_bundle_with_hidden_states(self, build_tiny: Builder, tiny_qwen2: Path) -> None:
        """Last token, normalised."""
        made = embed(build_tiny(**FP32, ret_postnorm=True), ["1+1="])
        assert isinstance(made, Embedded)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_qwen2)
        model = transformers.AutoModel.from_pretrained(tiny_qwen2, dtype=torch.float32)
        with torch.no_grad():
            state = model(**tokenizer("1+1=", return_tensors="pt")).last_hidden_state[0, -1].numpy()
        assert distances(made.vectors, state[None]).max() < 1e-8
