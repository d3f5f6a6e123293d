"""Speculative decoding with a draft model: the tokens are those of decoding without one."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from axrun.cli import main
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.generate import Stats, Token, steps
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence as TokenSequence
from axrun.speculation.draft import LONGEST_PAUSE, PROBE, DraftGuesser, GuessLength, open_for
from axrun.speculation.guesser import Costs, Guesser
from axrun.speculation.prompt_lookup import PromptLookup
from tests.doctor import axmodels

LENGTH = 60
PADDING = 64


@pytest.fixture(scope="module")
def model(bundle_s8: Path) -> Model:
    return Model.load(Bundle.open(bundle_s8))


@pytest.fixture(scope="module")
def other(bundle_fp32: Path) -> Model:
    """A model that nearly always agrees."""
    return Model.load(Bundle.open(bundle_fp32))


class Always(GuessLength):
    """Guesses 5 tokens, whatever they are worth."""

    def choose(self) -> int:
        return 5


def answer(model: Model, prompt: list[int], guesser: Guesser | None, stats: Stats, heat: float = 0.0) -> Sequence[int]:
    sampler = Sampler(Sampling(heat), 5)
    going = steps(TokenSequence(model), prompt, sampler, LENGTH, stats=stats, guesser=guesser)
    return [step.id for step in going if isinstance(step, Token)]


@pytest.mark.parametrize("heat", [0.0, 1.5])
@pytest.mark.parametrize("lookup", [False, True])
def test_a_draft_model_does_not_change_the_answer(
    model: Model, other: Model, heldout: list[int], heat: float, lookup: bool
) -> None:
    plain = answer(model, heldout[:70], None, Stats(), heat)
    stats, costs = Stats(), Costs()
    vocabulary, first = model.post.vocab_size, PromptLookup(costs) if lookup else None
    guesser = DraftGuesser(TokenSequence(other.another()), vocabulary, costs, Always(costs), first)
    assert answer(model, heldout[:70], guesser, stats, heat) == plain
    assert stats.guessed >= stats.accepted > 0


def test_the_model_itself_as_draft_is_always_right(model: Model, heldout: list[int]) -> None:
    stats, costs = Stats(), Costs()
    guesser = DraftGuesser(TokenSequence(model.another()), model.post.vocab_size, costs, Always(costs))
    answer(model, heldout[:70], guesser, stats)
    assert stats.guessed == stats.accepted > 0
    for prompt in (heldout[100:170], heldout[:30], heldout[:90]):  # the draft still holds the answer before
        stats = Stats()
        answer(model, prompt, DraftGuesser(guesser._sequence, model.post.vocab_size, costs, Always(costs)), stats)
        assert stats.guessed == stats.accepted > 0


def test_a_draft_is_not_asked_beside_other_answers(model: Model, heldout: list[int]) -> None:
    costs = Costs()
    guesser = DraftGuesser(TokenSequence(model.another()), model.post.vocab_size, costs, Always(costs))
    for seconds, count in ((0.1, 5), (None, 0), (None, 0), (0.1, 5)):
        guesser.learn(0, 0, seconds)
        assert len(guesser.guess(heldout[:20], heldout[20], 7)) == count


def test_the_time_of_a_draft_is_not_that_of_the_model(
    model: Model, heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that moves on by a second each time that it is read."""
    costs, ticks = Costs(), itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("axrun.speculation.draft.time", clock)
    guesser = DraftGuesser(TokenSequence(model.another()), model.post.vocab_size, costs, Always(costs))
    for _ in range(2):  # the first time of a shape only bounds the usual one
        guesser.learn(0, 0, 2.0)
    for _ in range(2):
        assert len(guesser.guess(heldout[:20], heldout[20], 7)) == 5
        guesser.learn(5, 5, 2.5)
    assert costs.ratio(5) == pytest.approx((2.5 - 1) / costs.one)


@pytest.fixture(scope="module")
def padded(tiny_qwen2: Path, build_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model with 64 rows of the vocabulary behind the last token, which are often the likeliest."""
    checkpoint = tmp_path_factory.mktemp("padded") / "checkpoint"
    shutil.copytree(tiny_qwen2, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + PADDING}))
    tensors = load_file(checkpoint / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([table, 4 * table[:PADDING]])
    save_file(tensors, checkpoint / "model.safetensors")
    return Model.load(Bundle.open(build_tiny(input_path=checkpoint)))


def test_a_draft_with_more_rows_in_its_vocabulary(model: Model, padded: Model, heldout: list[int]) -> None:
    """Its guesses are tokens that the model has."""
    stats, costs = Stats(), Costs()
    guesser = DraftGuesser(TokenSequence(padded), model.post.vocab_size, costs, Always(costs))
    assert answer(model, heldout[:70], guesser, stats) == answer(model, heldout[:70], None, Stats())
    assert stats.guessed > 0


def test_a_draft_with_fewer_rows_in_its_vocabulary(model: Model, padded: Model, heldout: list[int]) -> None:
    """It is not asked about tokens that it does not have."""
    prompt, stats, costs = [padded.post.vocab_size - 1, *heldout[:70]], Stats(), Costs()
    guesser = DraftGuesser(TokenSequence(model.another()), padded.post.vocab_size, costs, Always(costs))
    assert answer(padded, prompt, guesser, stats) == answer(padded, prompt, None, Stats())
    assert stats.guessed == 0


def drafted(share: float, rate: float, tokens: int) -> tuple[int, float]:
    """Guessed tokens of an answer, and its time in runs of one token, if the draft model takes `share` of such a run.

    `rate` of the guessed tokens are right; a run with guesses takes 1.5 times as long as one without.
    """
    costs, random = Costs(), np.random.default_rng(1)
    length, done, guessed, spent = GuessLength(costs), 0, 0, 0.0
    while done < tokens:
        count = length.choose()
        right = int(np.argmin([*(random.random(count) < rate), False]))
        seconds = 1.5 if count else 1.0
        costs.add(count, seconds)
        if count:
            length.drafted(share)
            length.verified(count, right)
        done, guessed, spent = done + 1 + right, guessed + count, spent + seconds + count * share
    return guessed, spent / done


def test_a_draft_that_costs_more_than_it_saves_is_asked_rarely() -> None:
    for share, rate in ((1.0, 0.9), (0.3, 0.1), (1.0, 0.0), (0.05, 0.05)):
        guessed, time = drafted(share, rate, 2000)
        assert PROBE <= guessed < 100, (share, rate)
        assert time < 1.05, (share, rate)


def test_a_quick_draft_that_is_often_right_is_asked_always() -> None:
    guessed, time = drafted(0.05, 0.9, 2000)
    assert guessed > 2000
    assert time < 0.5


def test_a_draft_that_is_not_worth_its_time_is_tried_again() -> None:
    costs = Costs()
    costs.add(0, 1.0)
    length = GuessLength(costs)
    length.drafted(1.0)
    counts = [length.choose() for _ in range(5 * LONGEST_PAUSE)]
    tries = [place for place, count in enumerate(counts) if count]
    assert len(tries) > 4
    assert {counts[place] for place in tries} == {1}
    assert LONGEST_PAUSE < max(np.diff(tries)) < LONGEST_PAUSE + 3


def test_another_tokenizer_is_refused_before_a_model_is_loaded(
    bundle_s8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle_s8, other)
    file = other / "hf" / "tokenizer.json"
    stored = json.loads(file.read_text())
    vocabulary = stored["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    axmodels.replace(other, "hf/tokenizer.json", json.dumps(stored).encode())
    with pytest.raises(BadInput, match="their tokenizers differ, first in"):
        open_for(Bundle.open(bundle_s8), other)
    assert open_for(Bundle.open(bundle_s8), bundle_s8).path == bundle_s8
    for command in (["run", bundle_s8, "--prompt", "1+1="], ["chat", bundle_s8], ["serve", bundle_s8, "--port", "0"]):
        assert main([*map(str, command), "--draft", str(other)]) == 2
        told = capsys.readouterr()
        assert "their tokenizers differ, first in" in told.err
        assert "axmodel init ok" not in told.err
        assert told.out == ""
