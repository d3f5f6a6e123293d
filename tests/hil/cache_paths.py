"""Runs on the board with the release's packages: takes a window of the reference on several paths through the KV cache.

Arguments: the bundle, the engine, threads (0: the engine's default). Prints JSON: for each path the scored positions,
mean and largest divergence from the checkpoint in nats, the largest logit difference from a fresh run, its position.

    fresh      the whole window at once
    decode     token by token around the end of each shape group's history, and at the end of the context
    chunks     prefill in chunks of odd lengths, like the turns of a conversation
    rollback   wrong tokens, rolled back, then the right ones, like a regenerated answer
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from axrun.format import logits as reference_logits
from axrun.format.bundle import Bundle
from axrun.model import Model

AROUND, WRONG = 3, 5  # tokens on each side of a boundary; tokens to roll back

path, engine, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
bundle = Bundle.open(path)
model = Model.load(bundle, engine, threads or None)
reference = reference_logits.read(path / reference_logits.NAME)
tokens = reference.tokens[0, :-1].tolist()[: bundle.kv_cache_len]
stride = max(group.tokens for group in bundle.groups)
boundaries = sorted({group.history for group in bundle.groups if 0 < group.history < len(tokens)} | {len(tokens)})


def divergence(position: int, row: Any) -> float:
    """KL(checkpoint || ours) after a token, over the top tokens and one bucket for the rest."""
    shifted = row.astype(np.float64) - row.max()
    ours = shifted - np.log(np.exp(shifted).sum())
    ids = reference.ids[0, position].astype(np.int64)
    p, q = reference.logprobs[0, position].astype(np.float64), ours[ids]
    found = float((np.exp(p) * (p - q)).sum())
    rest = float(reference.rest[0, position])
    if np.isfinite(rest):
        others = np.exp(ours)
        others[ids] = 0.0
        found += float(np.exp(rest) * (rest - np.log(max(others.sum(), np.finfo(np.float64).tiny))))
    return found


fresh: dict[int, Any] = {}  # logits by position
ways: dict[str, list[tuple[int, float, float]]] = {}  # position, divergence, difference


def score(way: str, position: int, row: Any) -> None:
    row = np.array(row, np.float32)
    difference = 0.0 if way == "fresh" else float(np.abs(row - fresh[position]).max())
    if way == "fresh":
        fresh[position] = row
    ways.setdefault(way, []).append((position, divergence(position, row), difference))


def near(position: int) -> bool:
    return any(abs(position - boundary) <= AROUND for boundary in boundaries)


def whole() -> None:
    done = 0
    for rows in model.blocks(tokens):
        for row in rows:
            if near(done) or done % 16 == 15:
                score("fresh", done, row)
            done += 1


def decode() -> None:
    done = 0
    for boundary in boundaries:
        start = max(boundary - AROUND, done)
        if start > done:
            model.forward(tokens[done:start])
            done = start
        while done < min(boundary + AROUND, len(tokens)):
            row = model.forward(tokens[done : done + 1])
            if done in fresh:
                score("decode", done, row)
            done += 1


def chunks() -> None:
    done = 0
    lengths = [7, stride - 1, 1, stride + 1, 33, stride, 2]
    while done < len(tokens):
        count = min(lengths[0], len(tokens) - done)
        lengths = lengths[1:] + lengths[:1]
        for offset, row in enumerate(model.forward(tokens[done : done + count], logits="all")):
            if done + offset in fresh:
                score("chunks", done + offset, row)
        done += count


def rollback() -> None:
    """From the end of the context backwards: earlier rows are reused, later ones are rewritten."""
    other = [(token + 1) % bundle.vocab_size for token in tokens]
    model.forward(tokens)
    for boundary in reversed(boundaries):
        start = max(boundary - AROUND, 0)
        model.decoder.cache.truncate(start)
        model.forward(other[start : min(start + WRONG, len(tokens))])
        model.decoder.cache.truncate(start)
        right = tokens[start : min(start + 2 * AROUND, len(tokens))]
        for offset, row in enumerate(model.forward(right, logits="all")):
            if start + offset in fresh:
                score("rollback", start + offset, row)


for walk in (whole, decode, chunks, rollback):
    model.decoder.cache.reset()
    walk()
print(
    json.dumps(
        {
            way: {
                "positions": len(scored),
                "mean_kld": sum(entry[1] for entry in scored) / len(scored),
                "max_kld": max(entry[1] for entry in scored),
                "difference": max(entry[2] for entry in scored),
                "at": max(scored, key=lambda entry: entry[2] or entry[1])[0],
            }
            for way, scored in ways.items()
        }
    )
)
