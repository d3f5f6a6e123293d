"""Score a tiny-qwen2 checkpoint: sums, fixed questions, perplexity, and what 8-bit weights change.

    python models/tiny-qwen2/eval.py [FOLDER]

transformers runs the model in float32. The quantised twin has every matrix rounded to 8 bits with one scale per output
row, and bfloat16 hidden states and K/V rows between layers: what an axmodel built with `-w s8 -t bf16` computes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from data import END_OF_TEXT, SAYINGS, TURN_END, chat_prompt, sum_is_held_out, tale
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen2ForCausalLM

WINDOW = 512
Pair = tuple[int, int]


@dataclass(frozen=True)
class Scores:
    """Shares are of 1; perplexity and divergence (nats) are per token of heldout.txt."""

    sums_seen: float  # a+b=, both below 100, pairs that training draws from
    sums_held_out: float  # the same, pairs kept from training
    sums_in_chat: float
    sums_in_chat_held_out: float
    sums_after_story: float  # a sample of 100, raw, after 150 to 900 tokens of story
    fixed_questions: float
    stories_understood: float  # 200 questions in the chat about stories kept from training
    perplexity: float
    s8_perplexity: float
    s8_agreement: float  # of the likeliest next token
    s8_divergence: float  # KL(float32 || s8)


@torch.inference_mode()
def answers(model: Qwen2ForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str], longest: int = 64) -> list[str]:
    """What greedy decoding appends to each prompt before <|im_end|> or <|endoftext|>.

    Prompts of one length are decoded together, so no padding is needed.
    """
    vocab = tokenizer.get_vocab()
    ends = {vocab[token] for token in (TURN_END, END_OF_TEXT)}
    by_length: dict[int, list[int]] = {}
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    for number, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(number)
    given = [""] * len(prompts)
    for length, numbers in by_length.items():
        rows = max(1, 65536 // (length + longest))
        for start in range(0, len(numbers), rows):
            batch = numbers[start : start + rows]
            for number, ids in zip(batch, _greedy(model, [encoded[n] for n in batch], ends, longest), strict=True):
                given[number] = tokenizer.decode(ids)
    return given


def _greedy(model: Qwen2ForCausalLM, prompts: list[list[int]], ends: set[int], longest: int) -> list[list[int]]:
    taken: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    step, past = torch.tensor(prompts), None
    for _ in range(longest):
        output = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        step, past = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        for row, token in enumerate(step[:, 0].tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                taken[row].append(token)
        if not any(running):
            break
    return taken


def exact(model: Qwen2ForCausalLM, tokenizer: Tokenizer, asked: Sequence[tuple[str, str]]) -> float:
    """The share of (prompt, expected answer) answered exactly."""
    given = answers(model, tokenizer, [prompt for prompt, _ in asked])
    return sum(answer == expected for answer, (_, expected) in zip(given, asked, strict=True)) / len(asked)


def raw_sum(pair: Pair) -> tuple[str, str]:
    return f"{pair[0]}+{pair[1]}=", str(sum(pair))


def chat_sums(pair: Pair) -> list[tuple[str, str]]:
    a, b = pair
    return [(chat_prompt(wording), str(a + b)) for wording in (f"{a}+{b}=", f"what is {a}+{b}?")]


def fixed_questions() -> list[tuple[str, str]]:
    """Every fixed question as it is written, in capitals, and without its closing mark."""
    return [
        (chat_prompt(typed), answer)
        for questions, answer in SAYINGS
        for question in questions
        for typed in dict.fromkeys((question, question.capitalize(), question.upper(), question.rstrip("?!")))
    ]


def story_sums(rng: Random, count: int) -> list[tuple[str, str]]:
    asked = []
    for _ in range(count):
        prompt, expected = raw_sum((rng.randrange(100), rng.randrange(100)))
        asked.append((f"{tale(rng, from_held_out=True)[0]}\nThe end.\n{prompt}", expected))
    return asked


def story_questions(rng: Random, count: int) -> list[tuple[str, str]]:
    asked = []
    for _ in range(count):
        text, questions = tale(rng, longest=3, from_held_out=True)
        question, answer = rng.choice(questions)
        asked.append((chat_prompt(f"{text}\n{question}"), answer))
    return asked


def rounded_rows(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in] rounded to 8 bits, symmetric, one scale per row, and back in float32."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def _through_bfloat16(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.to(torch.bfloat16).to(output.dtype)


def quantised(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """A copy with 8-bit matrices (the output matrix too, the embedding not) and bfloat16 between layers."""
    twin = copy.deepcopy(model)
    twin.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded_rows(module.weight.data)
    for layer in twin.model.layers:
        layer.register_forward_hook(_through_bfloat16)
        layer.self_attn.v_proj.register_forward_hook(_through_bfloat16)
        layer.self_attn.k_proj.register_forward_hook(_through_bfloat16)
    return twin


@torch.inference_mode()
def log_probabilities(model: Qwen2ForCausalLM, ids: Sequence[int], window: int = WINDOW) -> torch.Tensor:
    """[len(ids), vocab] float32: of the token after each position, in windows that do not see each other."""
    pieces = [torch.tensor([list(ids[start : start + window])]) for start in range(0, len(ids), window)]
    return torch.cat([model(input_ids=piece, use_cache=False).logits[0] for piece in pieces]).log_softmax(-1)


def perplexity(log_p: torch.Tensor, ids: Sequence[int], window: int = WINDOW) -> float:
    """Of every token that has one before it in its window."""
    scored = [i for i in range(len(ids) - 1) if (i + 1) % window]
    targets = torch.tensor([ids[i + 1] for i in scored])
    return math.exp(-log_p[scored].gather(1, targets[:, None]).mean().item())


def score(folder: Path) -> Scores:
    """Measure the checkpoint in `folder` (its heldout.txt included)."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = Random(0)
    pairs = [(a, b) for a in range(100) for b in range(100)]
    seen = [pair for pair in pairs if not sum_is_held_out(*pair)]
    kept = [pair for pair in pairs if sum_is_held_out(*pair)]

    def ask(asked: Sequence[tuple[str, str]]) -> float:
        return exact(model, tokenizer, asked)

    ids = tokenizer.encode((folder / "heldout.txt").read_text(encoding="utf-8")).ids
    log_p, log_q = log_probabilities(model, ids), log_probabilities(quantised(model), ids)
    return Scores(
        sums_seen=ask([raw_sum(pair) for pair in seen]),
        sums_held_out=ask([raw_sum(pair) for pair in kept]),
        sums_in_chat=ask([asked for pair in seen[::5] for asked in chat_sums(pair)]),
        sums_in_chat_held_out=ask([asked for pair in kept for asked in chat_sums(pair)]),
        sums_after_story=ask(story_sums(rng, 100)),
        fixed_questions=ask(fixed_questions()),
        stories_understood=ask(story_questions(rng, 200)),
        perplexity=perplexity(log_p, ids),
        s8_perplexity=perplexity(log_q, ids),
        s8_agreement=(log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item(),
        s8_divergence=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score a tiny-qwen2 checkpoint folder; prints JSON.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent, help="default: the shipped one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    start = time.monotonic()
    scores = {name: round(value, 6) for name, value in asdict(score(flags.folder)).items()}
    print(json.dumps(scores | {"seconds": round(time.monotonic() - start)}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
