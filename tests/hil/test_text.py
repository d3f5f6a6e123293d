"""Tokenizer and chat template on the board give the same ids as transformers with the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axrun.errors import CheckFailed
from ci.nightly import probe
from tests.hil.on_board import OnBoard

TEXT_IDS = Path(__file__).with_name("text_ids.py")


def test_texts_are_tokenised_like_the_checkpoint(on_board: OnBoard, request: pytest.FixtureRequest) -> None:
    file = request.config.option.hil_probe
    if file is None:
        pytest.fail(
            "no probe was named: --hil-probe FILE, made by: python -m ci.nightly.probe CHECKPOINT FILE", pytrace=False
        )
    expected = probe.read(file)
    texts = [entry["text"] for entry in expected["texts"]]
    conversations = [entry["messages"] for entry in expected["conversations"]]
    asked = {"texts": texts, "conversations": conversations, "variables": expected["variables"]}
    code = TEXT_IDS.read_text("utf-8")
    said = on_board.python("the tokenizer", code, f"{on_board.release}/model", json.dumps(asked))
    try:
        told = json.loads(said)
    except ValueError:
        raise CheckFailed(f"the tokenizer on {on_board.board.name} says {said[:80]!a}, expected token ids") from None
    if fault := probe.difference(expected, told):
        raise CheckFailed(f"{on_board.board.name} tokenizes text differently: {fault}")
