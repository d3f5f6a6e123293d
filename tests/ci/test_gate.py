"""Gates: judging figures, the reasons, and recording gates."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tomllib
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axrun.errors import BadInput
from ci.nightly import gate, metrics
from ci.nightly.gate import GATES, Gate, judge, record

BOARD, MODEL, MAKER = "ax650", "tiny-qwen2", "cpu"
GOOD = '[cpu.mean_kld]\nexpected = 1e-5\ntolerance = 1e-6\nunit = "nats"\nbasis = "measured"\nsource = "three nights"\n'


def write(folder: Path, text: str) -> Path:
    file = folder / BOARD / f"{MODEL}.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return folder


def expects(expected: float, tolerance: float, unit: str) -> Gate:
    return Gate(expected, tolerance, unit, "measured", "a test")


@pytest.mark.parametrize(
    ("name", "value", "outcome"),
    [
        ("decode_128", 29.0, "within"),
        ("decode_128", 26.0, "within"),
        ("decode_128", 25.9, "worse"),
        ("decode_128", 32.1, "too good"),
        ("ttft_128", 32.1, "worse"),
        ("ttft_128", 25.9, "too good"),
        ("mean_kld", 33.0, "worse"),
        ("top1_agreement", 33.0, "too good"),
    ],
)
def test_a_gate_holds_in_both_directions(name: str, value: float, outcome: str) -> None:
    judged = judge({name: value}, {name: expects(29.0, 3.0, metrics.find(name).unit)})
    assert [entry.outcome for entry in judged] == [outcome]
    assert judged[0].red == (outcome != "within")


def test_a_reason_has_the_value_and_its_gate() -> None:
    gates = {"mean_kld": expects(8e-6, 4e-7, "nats"), "decode_128": expects(29, 3, "token/s")}
    slow, kld = judge({"decode_128": 14.52, "mean_kld": 0.031}, gates)[::-1]
    assert kld.reason() == (
        "mean KL divergence from the checkpoint is 0.031 nats, worse than its gate 8.00e-06 ± 4.00e-07 nats"
    )
    assert slow.reason() == "decode behind 128 is 14.52 token/s, worse than its gate 29 ± 3 token/s"


def test_a_reason_shows_on_which_side_of_its_gate_a_figure_is() -> None:
    (ratio,) = judge({"perplexity_ratio": 1.001014}, {"perplexity_ratio": expects(1.0, 0.00101, "x")})
    assert ratio.reason() == "perplexity over the checkpoint's is 1.001014 x, worse than its gate 1 ± 0.00101 x"
    (near,) = judge({"mean_kld": 1.1000001e-5}, {"mean_kld": expects(1e-5, 1e-6, "nats")})
    assert near.reason().endswith("is 1.1000001e-05 nats, worse than its gate 1.0000000e-05 ± 1.0000000e-06 nats")


@given(
    expected=st.floats(-1e6, 1e6),
    tolerance=st.floats(0, 1e3),
    offset=st.floats(-2, 2),
)
def test_a_figure_is_printed_apart_from_its_gate(expected: float, tolerance: float, offset: float) -> None:
    """What a reader computes from the text is what was judged."""
    bounds = expects(expected, tolerance, "token/s")
    (entry,) = judge({"decode_128": expected + offset * tolerance}, {"decode_128": bounds})
    value = Decimal(entry.value_text.split()[0])
    middle, _, around, _ = entry.gate_text.split()
    inside = Decimal(middle) - Decimal(around) <= value <= Decimal(middle) + Decimal(around)
    assert inside == (entry.outcome == "within") or bounds.digits(entry.value or 0.0) == gate.MOST_DIGITS


def test_a_missing_figure_is_red_only_if_it_has_a_gate() -> None:
    judged = judge({"load": 1.0}, {"decode_128": expects(29, 3, "token/s")})
    assert [(entry.metric.name, entry.outcome, entry.red) for entry in judged] == [
        ("decode_128", "not measured", True),
        ("load", "no gate", False),
    ]
    assert judged[0].reason() == "decode behind 128 was not measured; its gate expects 29 ± 3 token/s"


def test_a_figure_that_is_not_a_number_is_never_within() -> None:
    assert judge({"mean_kld": math.nan}, {"mean_kld": expects(1, 1, "nats")})[0].red


def test_recording_takes_the_median_and_twice_the_spread(tmp_path: Path) -> None:
    nights = [{"decode_128": value, "mean_kld": 8e-6} for value in (20.0, 24.0, 21.0)]
    nights[0]["peak_memory"] = 1.0
    file = record(BOARD, MODEL, MAKER, nights, "3 nights", tmp_path)
    assert file == tmp_path / BOARD / f"{MODEL}.toml"
    gates = gate.load(BOARD, MODEL, MAKER, tmp_path)
    assert list(gates) == ["mean_kld", "decode_128"]  # peak memory: not in all of them
    assert gates["decode_128"] == Gate(21.0, 8.0, "token/s", "measured", "3 nights, spread 4")
    assert gates["mean_kld"].tolerance == pytest.approx(0.05 * 8e-6)  # no spread seen: the metric's floor


@given(
    values=st.lists(st.floats(1e-9, 1e9), min_size=3, max_size=8),
    name=st.sampled_from(["mean_kld", "decode_128", "work", "load"]),
)
def test_the_nights_a_gate_is_recorded_from_are_within_it(
    values: list[float], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("gates")
    record(BOARD, MODEL, MAKER, [{name: value} for value in values], "seen", folder)
    gates = gate.load(BOARD, MODEL, MAKER, folder)
    assert not [entry for value in values for entry in judge({name: value}, gates) if entry.red]


def test_recording_leaves_the_other_maker_and_needs_three_nights(tmp_path: Path) -> None:
    record(BOARD, MODEL, "pulsar2", [{"decode_128": 29.0}] * 3, 'a "vendor" night, ±', tmp_path)
    record(BOARD, MODEL, MAKER, [{"decode_128": 3.0}] * 3, "ours", tmp_path)
    assert gate.load(BOARD, MODEL, "pulsar2", tmp_path)["decode_128"].expected == 29
    assert gate.load(BOARD, MODEL, MAKER, tmp_path)["decode_128"].expected == 3
    with pytest.raises(BadInput, match=r"2 measured nights .* expected at least 3\nRun more: \S*invoke nightly"):
        record(BOARD, MODEL, MAKER, [{"decode_128": 3.0}] * 2, "ours", tmp_path)


def test_an_emulated_board_has_no_gate_that_follows_the_clock_of_its_machine(tmp_path: Path) -> None:
    night = {"mean_kld": 1e-5, "decode_128": 3.0, "work": 2.0, "ttft_16": 9.0, "load": 1.0}
    record("virtual", MODEL, MAKER, [night] * 3, "ours", tmp_path)
    assert list(gate.load("virtual", MODEL, MAKER, tmp_path)) == ["mean_kld", "work"]


def test_no_file_is_no_gates_and_a_name_never_leaves_the_folder(tmp_path: Path) -> None:
    assert gate.load(BOARD, MODEL, MAKER, tmp_path) == {}
    for board, model in (("../etc", MODEL), (BOARD, "a/b"), ("", MODEL), (BOARD, ".."), (BOARD, "x\n")):
        with pytest.raises(BadInput, match="is not a valid name of a"):
            gate.load(board, model, MAKER, tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("nats", "nat"), "unit is 'nat', expected nats"),
        (("1e-5", '"1e-5"'), "expected is '1e-5', expected a number"),
        (("1e-5", "nan"), "expected is nan, expected a number"),
        (("1e-5", "true"), "expected is True, expected a number"),
        (("1e-6", "-1e-6"), "tolerance is -1e-06, expected 0 or more"),
        (('"measured"', '"believed"'), "basis is 'believed', expected measured or published"),
        (("three nights", ""), "source is ''"),
        (
            ("tolerance", "tolerence"),
            "has expected, tolerence, unit, basis, source; expected expected, tol",
        ),
        (("cpu.", "gpu."), "no maker is named 'gpu': there are cpu, pulsar2"),
        (("mean_kld", "mean_kdl"), "line 1: no figure is named 'mean_kdl': is mean_kld meant?"),
        (("mean_kld", "decode_n"), "no figure is named 'decode_n'"),
        (("[cpu.mean_kld]", "cpu = 1\n[x]"), "expected tables of figures"),
        (("[cpu", "[[cpu"), "tiny-qwen2.toml is not valid TOML: "),
        (("1e-5", "9" * 400), "line 2: expected is an integer of 1329 bits, expected 64 at most"),
        (("1e-5", "9" * 5000), "tiny-qwen2.toml is not valid TOML: Exceeds the limit"),
        (("1e-5", f"0x{'f' * 5000}"), "line 2: expected is an integer of 20000 bits"),
        (("1e-5", "[" * 5000), "tiny-qwen2.toml is not valid TOML: it is nested too deeply"),
        (("1e-5", "1e300"), "expected is 1e+300, expected a number within ± 1e+15"),
        (("1e-6", "1e300"), "tolerance is 1e+300, expected a number within ± 1e+15"),
    ],
)
def test_an_invalid_gate_is_refused(change: tuple[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        gate.load(BOARD, MODEL, MAKER, write(tmp_path, GOOD.replace(*change)))
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert "tiny-qwen2.toml" in str(refused.value)


def test_every_gate_that_is_kept_can_be_read_and_is_named_like_a_board_and_a_model() -> None:
    files = sorted(GATES.rglob("*.toml"))
    assert {"ax650", "ax630c"} <= {file.parent.name for file in files}
    for file in files:
        for maker in tomllib.loads(file.read_text()):
            assert gate.load(file.parent.name, file.stem, maker)
        assert (Path(gate.__file__).parents[2] / "models" / f"{file.stem}.toml").is_file()


def test_the_first_baselines_of_the_boards_are_marked_as_published() -> None:
    for board, rate in (("ax650", 29.0), ("ax630c", 10.7)):
        gates = gate.load(board, "qwen2-0.5b", "pulsar2")
        assert gates["decode_128"].expected == rate
        assert {entry.basis for entry in gates.values()} == {"published"}


EVALUATION = {"mean_kld": 1e-5, "kld_99_9": 1e-4, "top1_agreement": 0.995, "perplexity_ratio": 1.001, "greedy_same": 31}


def times(name: str, **spread: object) -> dict[str, object]:
    return {name: {"median": 0.02, "min": 0.01, "max": 0.5, "runs": [], **spread}}


def bench(**changes: object) -> dict[str, object]:
    return {
        "load_seconds": 0.25,
        "peak_rss": 123_456_789,
        "prompts": [{"tokens": 16, "depth": 0, **times("ttft_seconds")}],
        "turns": [{"tokens": 16, "depth": 128, **times("ttft_seconds")}],
        "decode": [{"tokens": 8, "depth": 128, **times("token_seconds")}],
        **changes,
    }


def test_figures_are_read_from_axruns_reports() -> None:
    assert metrics.accuracy(EVALUATION) == {**EVALUATION, "top1_agreement": pytest.approx(99.5)}
    assert metrics.speed(bench(), cpu_seconds=3.0, yardstick=0.005) == pytest.approx(
        {
            "ttft_16": 20.0,
            "turn_128": 20.0,
            "decode_128": 50.0,
            "work": 600.0,
            "load": 0.25,
            "peak_memory": 123.456789,
        }
    )


def test_a_reference_without_greedy_answers_has_no_such_figure() -> None:
    assert "greedy_same" not in metrics.accuracy({**EVALUATION, "greedy_same": None})


@pytest.mark.parametrize("value", [None, "1e-5", True, math.nan, math.inf, -math.inf, [], {}, 1e300])
@pytest.mark.parametrize("name", ["mean_kld", "perplexity_ratio"])
def test_an_evaluation_that_is_no_number_is_an_error(name: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"axrun eval --json has .* for {name}, expected a number"):
        metrics.accuracy({**EVALUATION, name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"load_seconds": None},
        {"prompts": "many"},
        {"prompts": [1]},
        {"prompts": [{}] * 101},
        {"decode": [{"tokens": 8, "depth": 128, "token_seconds": 0.1}]},
        {"decode": [{"tokens": 8, "depth": 128, **times("token_seconds", median=0)}]},
        {"decode": [{"tokens": 8, "depth": math.nan, **times("token_seconds")}]},
    ],
)
def test_a_bench_that_is_damaged_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="axrun bench --json has"):
        metrics.speed(bench(**change), 1.0, 1.0)


@pytest.mark.parametrize(("cpu", "yardstick"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf), (-1.0, 1.0)])
def test_times_that_are_none_are_an_error(cpu: float, yardstick: float) -> None:
    with pytest.raises(BadInput, match=r"took .* s of processor time, expected a time"):
        metrics.speed(bench(), cpu, yardstick)


def test_every_figure_of_a_real_bundle_is_known(tmp_path: Path) -> None:
    """What axrun prints today, on this machine."""
    root = Path(metrics.__file__).parents[2]
    call = [sys.executable, "-m"]
    source = ["--input_path", str(root / "models" / "tiny-qwen2")]
    flags = ["--output_path", str(tmp_path / "b"), "--prefill_len", "16", "--check_level", "-1"]
    text = [*source, "--text", str(root / "models" / "tiny-qwen2" / "heldout.txt"), "--bundle", str(tmp_path / "b")]
    small = ["--window", "32", "--tokens", "64", "--greedy_tokens", "2"]
    subprocess.run([*call, "axc", "llm_build", *source, *flags], check=True, cwd=root, timeout=300)
    subprocess.run([*call, "axc", "reference", *text, *small], check=True, cwd=root, timeout=300)

    def axrun(*words: str) -> dict[str, object]:
        done = subprocess.run(
            [*call, "axrun", *words, "--json"], check=True, cwd=root, timeout=300, capture_output=True, text=True
        )
        return dict(json.loads(done.stdout))

    found = metrics.accuracy(axrun("eval", str(tmp_path / "b")))
    assert list(found) == list(metrics.ACCURACY)
    brief = ["--prompt-lengths", "16,64", "--depths", "0,64", "--tokens", "2", "--repeat", "1", "--warmup", "0"]
    found |= metrics.speed(axrun("bench", str(tmp_path / "b"), *brief), 2.0, 1e-3)
    assert {"ttft_16", "ttft_64", "turn_64", "decode_0", "decode_64", "load", "work"} <= set(found)
    assert all(metrics.find(name).unit or True for name in found)
    ranks = [metrics.rank(name) for name in metrics.ACCURACY]
    assert all(one < two for one, two in itertools.pairwise(ranks))
