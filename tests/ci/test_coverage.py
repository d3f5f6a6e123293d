"""A night's measurements reach every shape group and the end of the context: faults that start there are red."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axc import logits
from axc.models import load_model
from axrun import kv_cache
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.kv_cache import KVCache
from axrun.load import Loading
from axrun.measure.evaluate import evaluate
from ci.nightly import gate, metrics, pipeline, probe
from ci.nightly.gate import Gate
from tests.ci import plants
from tests.conftest import Builder

ROOT = Path(__file__).resolve().parents[2]
PATHS = ROOT / "tests" / "hil" / "cache_paths.py"
TEXT_IDS = ROOT / "tests" / "hil" / "text_ids.py"


@pytest.fixture(scope="module")
def night_bundle(build_tiny: Builder, tiny_qwen2: Path) -> Path:
    """The bundle of a night: tiny-qwen2 as models/tiny-qwen2.toml has it, and the reference of the night."""
    spec = load_model("tiny-qwen2").build
    groups = {"prefill_len": spec.prefill_len, "kv_cache_len": spec.kv_cache_len}
    bundle = build_tiny(**groups, last_kv_cache_len=spec.last_kv_cache_len, model_name="tiny-qwen2")
    flags = dict(zip(*[iter(pipeline.sizes(spec.kv_cache_len))] * 2, strict=True))
    numbers: dict[str, Any] = {name.removeprefix("--"): int(value) for name, value in flags.items()}
    logits.write(logits.Options(input_path=tiny_qwen2, text=pipeline.TEXT, bundle=bundle, **numbers))
    return bundle


def measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The figures of a night, on this machine."""
    found = metrics.accuracy(evaluate(bundle, loading=Loading(threads=1)).json())
    ways = json.loads(program(PATHS, monkeypatch, str(bundle), "ax", "1"))
    return found | metrics.cache(ways)


def program(file: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a program for the board prints here."""
    monkeypatch.setattr(sys, "argv", [str(file), *arguments])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(file), run_name="__main__")
    return said.getvalue()


@pytest.fixture(scope="module")
def healthy(night_bundle: Path) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        return measured(night_bundle, patch)


def red(figures: dict[str, float], healthy: dict[str, float]) -> set[str]:
    """What is worse by gates as they would be recorded from a healthy night."""
    gates = {
        name: Gate(value, metrics.find(name).floor * abs(value), metrics.find(name).unit, "measured", "a test")
        for name, value in healthy.items()
    }
    return {entry.metric.name for entry in gate.judge(figures, gates) if entry.outcome == "worse"}


def test_a_healthy_bundle_is_not_worse(healthy: dict[str, float]) -> None:
    """Than the emulated board's gates, on this machine's processor."""
    judged = gate.judge(healthy, gate.load("virtual", "tiny-qwen2", "cpu"))
    assert [entry.metric.name for entry in judged if entry.outcome == "worse"] == []


@pytest.mark.parametrize("position", [128, 192, 240])
def test_rotary_that_is_zero_from_a_position_on_is_red(
    position: int, night_bundle: Path, healthy: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = shutil.copytree(night_bundle, tmp_path / "faulty")
    plants.zero_rotary(faulty, position)
    found = measured(faulty, monkeypatch)
    assert {"mean_kld", "perplexity_ratio", "cache_kld"} <= red(found, healthy), found


def test_a_flipped_scale_is_red(
    night_bundle: Path, healthy: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = shutil.copytree(night_bundle, tmp_path / "faulty")
    plants.flip_a_scale(faulty)
    assert {"mean_kld", "cache_kld"} <= red(measured(faulty, monkeypatch), healthy)


def lose_last_row(past: int, count: int) -> bool:
    return past >= 192


def lose_last_row_in_decode(past: int, count: int) -> bool:
    return past >= 192 and count == 1


def lose_last_row_in_odd_chunks(past: int, count: int) -> bool:
    return past % 64 != 0 and count > 1


@pytest.mark.parametrize(
    ("when", "figures"),
    [
        (lose_last_row, {"mean_kld", "cache_kld"}),
        (lose_last_row_in_decode, {"cache_kld", "cache_difference"}),
        (lose_last_row_in_odd_chunks, {"cache_kld", "cache_difference"}),
    ],
)
def test_a_lost_row_of_the_cache_is_red(
    when: Callable[[int, int], bool],
    figures: set[str],
    night_bundle: Path,
    healthy: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mask hides the last cached row."""
    fill = kv_cache.fill_mask

    def forget(mask: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
        fill(mask, past, count, visible, blocked)
        if when(past, count):
            mask[0, :count, past - 1] = blocked

    monkeypatch.setattr("axrun.decoder.fill_mask", forget)
    found = measured(night_bundle, monkeypatch)
    assert figures <= red(found, healthy), found


def test_a_rollback_that_damages_a_row_is_red(
    night_bundle: Path, healthy: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row that stays is overwritten."""
    truncate = KVCache.truncate

    def late(self: KVCache, length: int) -> None:
        before = self.length
        truncate(self, length)
        if 64 < length < before:
            for array in (*self.keys, *self.values):
                array[:, length - 1] = array[:, length - 2]

    monkeypatch.setattr(KVCache, "truncate", late)
    found = measured(night_bundle, monkeypatch)
    assert red(found, healthy) == {"cache_kld", "cache_difference"}, found


def test_windows_reach_the_end_of_any_context() -> None:
    for context in (2, 127, 255, 1023, 4095):
        flags = dict(zip(*[iter(pipeline.sizes(context))] * 2, strict=True))
        assert int(flags["--window"]) == context + 1
        assert int(flags["--tokens"]) % int(flags["--window"]) == 0
        assert int(flags["--tokens"]) >= 1024
        assert len(pipeline.long_enough(b"text", context)) >= 8 * int(flags["--tokens"])
    assert pipeline.sizes(1 << 17)[1] == str(pipeline.MOST_WINDOW)


def test_a_reference_that_stops_short_is_not_enough(night_bundle: Path, tmp_path: Path, tiny_qwen2: Path) -> None:
    context = Bundle.open(night_bundle).kv_cache_len
    assert pipeline.reaches(night_bundle, context)
    short = shutil.copytree(night_bundle, tmp_path / "short")
    options = logits.Options(
        input_path=tiny_qwen2, text=pipeline.TEXT, bundle=short, window=128, tokens=256, greedy_tokens=0
    )
    logits.write(options)
    assert not pipeline.reaches(short, context)


def test_a_different_tokenizer_is_detected_by_its_ids(night_bundle: Path, tmp_path: Path, tiny_qwen2: Path) -> None:
    expected = probe.make(tiny_qwen2)

    def told(bundle: Path) -> str:
        texts = [entry["text"] for entry in expected["texts"]]
        conversations = [entry["messages"] for entry in expected["conversations"]]
        asked = {"texts": texts, "conversations": conversations, "variables": expected["variables"]}
        with pytest.MonkeyPatch.context() as patch:
            return probe.difference(expected, json.loads(program(TEXT_IDS, patch, str(bundle), json.dumps(asked))))

    assert len(expected["conversations"]) == 3
    assert told(night_bundle) == ""
    other = shutil.copytree(night_bundle, tmp_path / "other")
    file = other / "hf" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[: len(merges) // 2]
    file.write_text(json.dumps(tokenizer))
    assert told(other).startswith("its tokenizer turns ")
    shutil.copyfile(night_bundle / "hf" / "tokenizer.json", file)
    settings = other / "hf" / "tokenizer_config.json"
    assert "<|im_start|>" in settings.read_text()
    settings.write_text(settings.read_text().replace("<|im_start|>' + message", "' + message"))
    assert told(other).startswith("its chat template turns ")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="transformers cannot load a tokenizer from "):
        probe.make(tmp_path)
