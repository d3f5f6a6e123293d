"""Log probabilities and penalties against torch, and against the formulas of OpenAI's documentation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from axrun.errors import CheckFailed
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.serve.logprobs import likeliest, log_softmax
from axrun.text.tokenizer import Tokenizer

LOGITS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(-50, 50, width=32))


@settings(deadline=None)
@given(LOGITS)
def test_log_softmax_matches_torch(logits: Any) -> None:
    expected = torch.from_numpy(logits.copy()).log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, atol=1e-5)
    np.testing.assert_array_equal(log_softmax(logits)[0], log_softmax(logits[0]))


@settings(deadline=None)
@given(LOGITS, st.integers(0, 20))
def test_likeliest_matches_a_stable_sort(logits: Any, count: int) -> None:
    row = np.round(logits[0])  # creates ties
    assert list(likeliest(row, count)) == list(np.argsort(-row, kind="stable")[:count])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_logits_are_refused(bad: float) -> None:
    with pytest.raises(CheckFailed, match="not finite"):
        log_softmax(np.array([1.0, bad, 2.0], np.float32))


@settings(deadline=None)
@given(LOGITS, st.lists(st.integers(0, 39), max_size=20), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_match_the_formulas_of_openai(
    logits: Any, written: list[int], presence: float, frequency: float
) -> None:
    row = logits[0]
    answer = Counter(token for token in written if token < len(row))
    bias = {0: 3.5, len(row) - 1: -100.0}
    expected = row.astype(np.float64)
    for token in range(len(row)):
        count = answer[token]
        expected[token] += bias.get(token, 0) - count * frequency - (count > 0) * presence
    before = row.copy()
    ids = [1, 1, 0, *answer.elements()]  # the prompt does not count
    sampler = Sampler(Sampling(presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias))
    for stop in range(3, len(ids) + 1):
        seen = sampler.processed(row, ids[:stop], 3)
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    np.testing.assert_array_equal(row, before)
    assert Sampler(Sampling()).processed(row, ids, 3) is row


def test_token_bytes_spell_the_text(tiny_qwen2: Path, hf_tokenizer: Any, heldout: str) -> None:
    tokenizer = Tokenizer.find(tiny_qwen2)
    assert tokenizer is not None
    for text in (heldout[:500], "na\u00efve \u4f60\u597d \U0001f98a\n\t\x00", "<|im_start|>user"):
        ids = hf_tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(10_000_000) == b""
    every = {tokenizer.token_bytes(token) for token in range(len(hf_tokenizer))}
    assert {bytes([byte]) for byte in range(256)} <= every


def test_token_bytes_of_sentencepiece(tmp_path: Path) -> None:
    """Llama's vocabulary: U+2581 for spaces, <0xNN> for bytes without a piece."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "\u2581river": 4, "s": 5}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.find(tmp_path)
    assert tokenizer is not None
    assert b"".join(map(tokenizer.token_bytes, [4, 5, 1, 2, 3])).decode() == " rivers\u20ac"
    assert tokenizer.decode([4, 5, 1, 2, 3]) == " rivers\u20ac"
