"""Train tiny-qwen2 from nothing: its tokenizer, its weights, and the checkpoint folder around them.

    python models/tiny-qwen2/train.py --output_path DIR

Seeded and deterministic: the same machine, torch build, flags and `--threads` give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait starve any other job

import torch
from data import (
    DEFAULT_SYSTEM,
    SPECIAL_TOKENS,
    Document,
    chat_document,
    chat_sum_document,
    corpus,
    held_out_text,
    long_document,
    reading_document,
    sum_document,
)
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 640
CONTEXT = 1024
ROPE_THETA = 10000.0
END_OF_TEXT, _, TURN_END = SPECIAL_TOKENS

# The pre-tokenizer of Qwen2: contractions, words with one leading mark, single digits, marks, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    steps: int = 600
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    threads: int = 2


def train_tokenizer(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` ids: 256 bytes, learnt merges, then the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer.train_from_iterator((marks.sub("", text) for text in texts), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"got {tokenizer.get_vocab_size()} tokens, expected {vocab_size}: draw a larger corpus")
    return tokenizer


IGNORED = -100  # the target of a token that is read and not learnt
Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and targets, int64 [rows, length]


KINDS = ("sums", "chat sums", "chats", "readings", "stories")


class Batches:
    """Per training step one batch of every kind of document."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.padding = tokenizer.get_vocab()[END_OF_TEXT]
        self.rng = Random(seed)
        self.stream: list[tuple[int, int]] = []

    def _encoded(self, document: Document) -> list[tuple[int, int]]:
        """(token, target) pairs. Pieces meet where the pre-tokenizer splits anyway, so they may be encoded apart."""
        return [
            (token, token if learnt else IGNORED)
            for text, learnt in document
            for token in self.tokenizer.encode(text).ids
        ]

    def _padded(self, documents: Iterable[Document]) -> Batch:
        rows = [self._encoded(document) for document in documents]
        length = max(map(len, rows))
        return self._batch([row + [(self.padding, IGNORED)] * (length - len(row)) for row in rows])

    def _cut(self, rows: int, length: int) -> Batch:
        while len(self.stream) < rows * length:
            self.stream += self._encoded(long_document(self.rng))
        taken, self.stream = self.stream[: rows * length], self.stream[rows * length :]
        return self._batch([taken[row * length : (row + 1) * length] for row in range(rows)])

    def _batch(self, rows: Sequence[Sequence[tuple[int, int]]]) -> Batch:
        tokens, targets = torch.tensor(rows).unbind(-1)
        return tokens, targets

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        rng = self.rng
        while True:
            days, readings = rng.choice(((1, 16), (3, 6), (7, 3)))
            turns = rng.choices((1, 2, 3), (3, 2, 2))[0]
            length = rng.choices((256, 512, CONTEXT), (1, 2, 1))[0]
            yield (
                self._padded(sum_document(rng) for _ in range(192)),
                self._padded(chat_sum_document(rng, turns) for _ in range(64 // (turns + 1))),
                self._padded(chat_document(rng, turns) for _ in range(64 // (turns + 1))),
                self._padded(reading_document(rng, days) for _ in range(readings)),
                self._cut(2048 // length, length),
            )


def new_model(tokenizer: Tokenizer) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
            eos_token_id=tokenizer.token_to_id(TURN_END),
        )
    )


def new_optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding, norms and biases.

    Muon (https://kellerjordan.github.io/posts/muon) learns the sums in a quarter of AdamW's steps.
    """
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    rate = recipe.learning_rate
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to zero."""
    warm_up = max(1, recipe.steps // 20)
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))


def train(recipe: Recipe, tokenizer: Tokenizer, report: Callable[[str], None]) -> tuple[Qwen2ForCausalLM, list[float]]:
    """Train a new model; also returns the loss of every step (nats per token, mean over the kinds)."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    model = new_model(tokenizer)
    model.train()
    optimizers = new_optimizers(model, recipe)
    batches = iter(Batches(tokenizer, recipe.seed + 1))
    losses = []
    start = time.monotonic()
    for step in range(recipe.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate_at(step, recipe)
        parts = []
        for inputs, targets in next(batches):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=inputs, labels=targets, use_cache=False).loss
            loss.backward()
            parts.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(sum(parts) / len(parts))
        if step % 20 == 19 or step + 1 == recipe.steps:
            shown = "  ".join(f"{kind} {part:.3f}" for kind, part in zip(KINDS, parts, strict=True))
            report(f"step {step + 1}/{recipe.steps}  loss of {shown}  {time.monotonic() - start:.0f} s")
    return model, losses


def write_checkpoint(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder with the keys and files that Qwen2 repositories have; weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    end_of_text, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    documents = {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": end_of_text,
            "eos_token_id": turn_end,
            "hidden_act": config.hidden_act,
            "hidden_size": config.hidden_size,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "max_window_layers": config.num_hidden_layers,
            "model_type": "qwen2",
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": ROPE_THETA,
            "sliding_window": config.max_position_embeddings,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": config.vocab_size,
        },
        "generation_config.json": {
            "bos_token_id": end_of_text,
            "do_sample": False,
            "eos_token_id": [turn_end, end_of_text],
            "pad_token_id": end_of_text,
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in SPECIAL_TOKENS
            },
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "errors": "replace",
            "model_max_length": config.max_position_embeddings,
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    path = folder / "model.safetensors"
    save_file(weights, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # save_file makes it private


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    return train_tokenizer(corpus(recipe.seed, documents=3000))


def make_held_out(recipe: Recipe) -> str:
    return held_out_text(recipe.seed, size=16000)


def build(recipe: Recipe, folder: Path, report: Callable[[str], None]) -> list[float]:
    """Everything from the seed to the finished folder, the held-out text included."""
    tokenizer = make_tokenizer(recipe)
    model, losses = train(recipe, tokenizer, report)
    write_checkpoint(model, tokenizer, folder)
    (folder / "heldout.txt").write_text(make_held_out(recipe), encoding="utf-8")
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    default = Recipe()
    parser = argparse.ArgumentParser(
        description="Train tiny-qwen2 and write its checkpoint folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=default.seed, help="seed of data, initial weights and batches")
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps")
    parser.add_argument("--learning_rate", type=float, default=default.learning_rate, help="peak learning rate")
    parser.add_argument("--weight_decay", type=float, default=default.weight_decay, help="AdamW's, matrices only")
    parser.add_argument("--threads", type=int, default=default.threads, help="CPU threads; the bits depend on it")
    flags = parser.parse_args(arguments)
    recipe = Recipe(flags.seed, flags.steps, flags.learning_rate, flags.weight_decay, flags.threads)
    build(recipe, flags.output_path, lambda line: print(line, file=sys.stderr, flush=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
