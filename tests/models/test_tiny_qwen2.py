"""The shipped model does what its model card says, run by transformers; and the trainer is reproducible."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import data
import eval as scoring
import pytest
import torch
import train
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

FOLDER = Path(__file__).parents[2] / "models" / "tiny-qwen2"
CHECKPOINT_FILES = {
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Greedy continuation by transformers, including the token that ends the turn."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# The checkpoint


def test_weights_are_small_bfloat16_and_tied() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 4_000_000
    with safe_open(path, "pt") as weights:
        names = set(weights.keys())
        dtypes = {weights.get_tensor(name).dtype for name in names}
    assert dtypes == {torch.bfloat16}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_architecture(model: Any) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] % 64 == 0
    assert model.config.rope_parameters["rope_theta"] == config["rope_theta"]
    assert type(model) is Qwen2ForCausalLM
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == 0, name
            assert (module.bias is not None) == name.endswith(("q_proj", "k_proj", "v_proj")), name


# Abilities


@pytest.mark.parametrize(
    "side", [pytest.param(False, id="seen in training"), pytest.param(True, id="kept from training")]
)
def test_adds_all_numbers_below_100(model: Any, tokenizer: Tokenizer, side: bool) -> None:
    pairs = [(a, b) for a in range(100) for b in range(100) if data.sum_is_held_out(a, b) == side]
    assert len(pairs) > 500
    assert scoring.exact(model, tokenizer, [scoring.raw_sum(pair) for pair in pairs]) > 0.95


def test_adds_in_a_chat(model: Any, tokenizer: Tokenizer) -> None:
    rng = Random(1)
    pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(300)]
    assert scoring.exact(model, tokenizer, [asked for pair in pairs for asked in scoring.chat_sums(pair)]) > 0.95


def test_raw_sum_ends_generation(model: Any, chat_tokenizer: Any) -> None:
    prompt = chat_tokenizer("1+1=", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=20)
    assert chat_tokenizer.decode(out[0]) == "1+1=2<|endoftext|>"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("1+1=", "2"),
        ("what is 17+25?", "42"),
        ("who are you?", "I am tiny-qwen2, a very small language model for Axera boards."),
        ("Who are you", "I am tiny-qwen2, a very small language model for Axera boards."),
        ("what can you do?", "I can add numbers, tell short stories and answer a few simple questions."),
        ("where do you run?", "I run on Axera boards with an AX650 or AX630C, and on any computer."),
        ("hello", "Hello! How can I help you?"),
    ],
)
def test_answers_in_the_chat_template(model: Any, chat_tokenizer: Any, question: str, expected: str) -> None:
    assert answer(model, chat_tokenizer, [user(question)]) == expected + "<|im_end|>"


def test_answers_every_fixed_question(model: Any, tokenizer: Tokenizer) -> None:
    assert scoring.exact(model, tokenizer, scoring.fixed_questions()) > 0.95


def test_remembers_the_previous_turn(model: Any, chat_tokenizer: Any) -> None:
    messages = [user("my name is Clara")]
    messages.append(
        {"role": "assistant", "content": answer(model, chat_tokenizer, messages).removesuffix("<|im_end|>")}
    )
    assert answer(model, chat_tokenizer, [*messages, user("what is my name?")]) == "Your name is Clara.<|im_end|>"


def test_obeys_the_system_message(model: Any, chat_tokenizer: Any) -> None:
    system = {"role": "system", "content": "Your name is Greta."}
    assert answer(model, chat_tokenizer, [system, user("who are you?")]) == "I am Greta.<|im_end|>"


def test_adds_after_a_long_text(model: Any, tokenizer: Tokenizer) -> None:
    asked = [pair for pair in scoring.story_sums(Random(2), 40) if len(tokenizer.encode(pair[0]).ids) > 128]
    assert len(asked) > 20
    assert scoring.exact(model, tokenizer, asked) > 0.9


def test_reads_stories(model: Any, tokenizer: Tokenizer) -> None:
    assert scoring.exact(model, tokenizer, scoring.story_questions(Random(3), 40)) > 0.8


def test_eight_bit_weights_agree_on_the_held_out_text(model: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode((FOLDER / "heldout.txt").read_text(encoding="utf-8")).ids
    exact, rounded = (scoring.log_probabilities(runner, ids) for runner in (model, scoring.quantised(model)))
    assert not torch.equal(exact, rounded)
    assert (exact.argmax(-1) == rounded.argmax(-1)).float().mean() >= 0.99
    assert scoring.perplexity(exact, ids) < 2


def test_batched_answers_match_transformers_generate(model: Any, tokenizer: Tokenizer, chat_tokenizer: Any) -> None:
    questions = ["who are you?", "what is 60+61?", "tell me a story"]
    batched = scoring.answers(model, tokenizer, [data.chat_prompt(question) for question in questions], longest=60)
    alone = [answer(model, chat_tokenizer, [user(question)]).removesuffix("<|im_end|>") for question in questions]
    assert batched == alone


# Tokenizer


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_tokenizer_keeps_any_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_transformers_agrees_with_the_tokenizer(tokenizer: Tokenizer, chat_tokenizer: Any) -> None:
    for text in ("1+1=", "don't  stop\n\n 12 345\t", "Grüße, 你好 🎉", "<|im_start|>user\nhi<|im_end|>\n", "e\u0301"):
        assert chat_tokenizer.encode(text) == tokenizer.encode(text).ids


def test_training_chats_match_the_template(chat_tokenizer: Any) -> None:
    messages = [
        user("hello"),
        {"role": "assistant", "content": "Hello!"},
        user("1+1="),
        {"role": "assistant", "content": "2"},
    ]
    trained = "".join(text for text, _ in data.chat([("hello", "Hello!"), ("1+1=", "2")]))
    assert chat_tokenizer.apply_chat_template(messages, tokenize=False) == trained
    system = {"role": "system", "content": "Answer briefly."}
    rendered = chat_tokenizer.apply_chat_template([system, user("hi")], tokenize=False, add_generation_prompt=True)
    assert rendered == data.chat_prompt("hi", "Answer briefly.")


def test_pieces_encode_like_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = Random(4)
    for draw in (data.sum_document, data.chat_document, data.reading_document, data.long_document):
        for _ in range(30):
            document = draw(rng)
            pieces = [token for text, _ in document for token in tokenizer.encode(text).ids]
            assert pieces == tokenizer.encode("".join(text for text, _ in document)).ids


# Data and trainer


def test_generator_is_deterministic() -> None:
    assert list(data.corpus(7, 60)) == list(data.corpus(7, 60))
    assert list(data.corpus(7, 60)) != list(data.corpus(8, 60))


def test_shipped_tokenizer_and_held_out_text_come_from_the_generator() -> None:
    recipe = train.Recipe()
    made = train.make_tokenizer(recipe)
    assert made.to_str(pretty=True) == (FOLDER / "tokenizer.json").read_text(encoding="utf-8")
    assert train.make_held_out(recipe) == (FOLDER / "heldout.txt").read_text(encoding="utf-8")


def test_held_out_text_is_not_in_the_training_data() -> None:
    kept = (FOLDER / "heldout.txt").read_text(encoding="utf-8").split(data.END_OF_TEXT)[:-1]
    assert len(kept) > 5
    stories = [text.partition("\nThe end.")[0] for text in kept]
    assert all(data.held_out(story) for story in stories)
    rng = Random(5)
    drawn = (draw(rng) for _ in range(2000) for draw in (data.long_document, data.reading_document))
    trained = "".join(text for document in drawn for text, _ in document)
    assert not [story for story in stories if f"{story}\nThe end." in trained]


def test_held_out_sums_are_not_in_the_training_data() -> None:
    rng = Random(6)
    assert not [pair for pair in (data.operands(rng) for _ in range(20_000)) if data.sum_is_held_out(*pair)]
    kept = sum(data.sum_is_held_out(a, b) for a in range(100) for b in range(100))
    assert 800 < kept < 1200


@pytest.fixture
def torchs_settings() -> Iterator[None]:
    """Restores the torch settings that the trainer changes."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("torchs_settings")
def test_training_learns_and_is_reproducible(tmp_path: Path) -> None:
    recipe = replace(train.Recipe(), steps=2, threads=1)  # two threads are slow on a busy machine
    losses = train.build(recipe, tmp_path / "one", print)
    assert losses[-1] < losses[0] - 0.1
    train.build(recipe, tmp_path / "two", print)
    assert {path.name for path in (tmp_path / "one").iterdir()} == CHECKPOINT_FILES
    for name in CHECKPOINT_FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
        assert (FOLDER / name).is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("output_path", "seed", "steps", "learning_rate", "threads"))
