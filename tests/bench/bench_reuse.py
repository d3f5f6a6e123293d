"""What guessed tokens and stored prompts save, on the real SmolLM2-135M-Instruct in s8.

`make bench ARGS='-k reuse'`. Ways take turns; the best of the rounds counts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from axc import fetch
from axc.models import load_model
from axrun.format.bundle import Bundle
from axrun.generate import Stats, Token, steps
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence
from axrun.speculation.guesser import Costs
from axrun.speculation.prompt_lookup import PromptLookup
from axrun.text.template import ChatTemplate, chat_ids
from axrun.text.tokenizer import Tokenizer
from tests.bench.bench_engine import ROOT
from tests.bench.tables import record
from tests.serve.server import MODEL, Server

ROUNDS, TOKENS = 5, 150
TEXT = """The quick brown dog jumps over the lazy fox near the river bank while the sun sets slowly behind the distant
mountains and the birds fly home. Later that evening the farmer closed the wooden gate, fed the horses, and walked back
to the small stone house where his wife was cooking soup. They sat by the fire and talked about the harvest until the
moon stood high above the barn.""".replace("\n", " ")
QUESTIONS = {
    "repeat a text, one word changed": f"{TEXT}\n\nRepeat the text above word for word, only write cat instead of dog.",
    "write a function": "Write a Python function that computes the Fibonacci numbers, with comments.",
    "tell a story": "Tell me a story about a sailor who finds an island.",
    "explain": "Explain why the sky is blue.",
}
SYSTEM = 900  # tokens


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reuse") / "smollm2-135m"
    command = [sys.executable, "-m", "axc", "llm_build", "--output_path", str(output), "--kv_cache_len", "1023"]
    command += ["--input_path", str(fetch.fetch(load_model("smollm2-135m"))), "--prefill_len", "128"]
    command += ["-w", "s8", "--hidden_state_type", "bf16", "--check_level", "-1"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return output


def test_prompt_lookup(benchmark: BenchmarkFixture, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    model, tokenizer = Model.load(opened, threads=2), Tokenizer.open(opened.hf)
    template, costs = ChatTemplate.find(opened.hf), Costs()
    assert template is not None
    best: dict[tuple[str, bool], Stats] = {}
    answers: dict[str, list[int]] = {}

    def answer(name: str, guess: bool) -> None:
        ids = chat_ids(tokenizer, template, [{"role": "user", "content": QUESTIONS[name]}])
        stats, guesser = Stats(), PromptLookup(costs) if guess else None
        going = steps(
            Sequence(model), ids, Sampler(Sampling()), TOKENS, tokenizer.stop_ids, stats=stats, guesser=guesser
        )
        tokens = [step.id for step in going if isinstance(step, Token)]
        assert answers.setdefault(name, tokens) == tokens
        if (name, guess) not in best or stats.decode_rate > best[name, guess].decode_rate:
            best[name, guess] = stats

    def turn() -> None:
        for name in QUESTIONS:
            for guess in (False, True):
                answer(name, guess)

    benchmark.pedantic(turn, rounds=ROUNDS)
    rows = []
    for name in QUESTIONS:
        plain, guessed = best[name, False], best[name, True]
        ratio = f"{guessed.decode_rate / plain.decode_rate:.2f}x"
        right = f"{guessed.accepted} of {guessed.guessed}"
        rows.append([name, f"{plain.decode_rate:.0f}", f"{guessed.decode_rate:.0f}", ratio, right])
    columns = ["", "one by one", "prompt lookup", "ratio", "guesses that were right"]
    record(
        benchmark, "prompt-lookup", "Prompt lookup: SmolLM2-135M-Instruct s8, two cores, token/s", columns, rows,
        unit="token/s", bars=("one by one", "prompt lookup"), note="The tokens of both answers are the same.",
    )  # fmt: skip


def test_a_stored_prompt_after_a_restart(benchmark: BenchmarkFixture, bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    tokenizer = Tokenizer.open(opened.hf)
    prompt = (tokenizer.encode(TEXT) * SYSTEM)[:SYSTEM]
    times: dict[str, list[float]] = {"without": [], "with --prompt-cache": []}

    def first_token(*flags: object) -> float:
        server = Server(bundle, "--name", MODEL, *flags).ready()
        try:
            server.complete([1, 2, 3], max_tokens=1)  # memory of the server is warm; the prompt is not
            started = time.perf_counter()
            server.complete([*prompt, 5, 6, 7], max_tokens=1)
            return time.perf_counter() - started
        finally:
            assert server.stop() == 0

    stored = "--prompt-cache", tmp_path / "cache"
    first_token(*stored)

    def turn() -> None:
        times["without"].append(first_token())
        times["with --prompt-cache"].append(first_token(*stored))

    benchmark.pedantic(turn, rounds=ROUNDS)
    least = {name: min(seconds) for name, seconds in times.items()}
    rows = [[name, f"{1e3 * seconds:.1f}", f"{seconds / least['without']:.2f}x"] for name, seconds in least.items()]
    title = f"Server: time to first token after a restart, {SYSTEM} tokens of prompt stored, SmolLM2-135M s8, one core"
    record(benchmark, "prompt-cache", title, ["", "ms", "ratio"], rows, unit="ms", bars=("ms",))
