"""axrun eval: perplexity, KL divergence and token agreement of a bundle against reference logits of its checkpoint.

Needs no torch, so that a board can evaluate a bundle on its own engine. The metrics are those of llama.cpp's perplexity
tool,
https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput, CheckFailed
from axrun.format import logits as reference_logits
from axrun.format.bundle import MANIFEST, Bundle, sha256
from axrun.format.logits import ReferenceLogits
from axrun.generate import generate
from axrun.load import DEFAULTS, Loading
from axrun.model import Logits, Model
from axrun.progress import Progress, Show, unseen
from axrun.sampling import Sampling
from axrun.sequence import Sequence

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Metrics over `positions` scored tokens; divergences in nats, agreement as a fraction.

    `divergence` says whether divergences are exact or lower bounds. `greedy_same` is the number of tokens of a greedy
    answer before the first one that differs from the checkpoint's: the mean over `greedy_answers` of `greedy_tokens`
    each (None: the reference has none). `logits_sha256` is the digest of all scored logits, float32: with our engine
    and integer weights it is equal on every machine.
    """

    positions: int
    windows: int
    window: int
    perplexity: float
    reference_perplexity: float
    divergence: str
    mean_kld: float
    median_kld: float
    kld_99_9: float
    max_kld: float
    top1_agreement: float
    greedy_answers: int
    greedy_tokens: int
    greedy_same: float | None
    logits_sha256: str

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity


@dataclass(frozen=True)
class Evaluation:
    """The metrics, with bundle, reference and engine."""

    quality: Quality
    bundle: str
    manifest_sha256: str
    reference_sha256: str
    maker: str
    compiler: str
    engine: str

    def json(self) -> dict[str, Any]:
        figures = {**dataclasses.asdict(self.quality), "perplexity_ratio": self.quality.perplexity_ratio}
        about = {key: value for key, value in dataclasses.asdict(self).items() if key != "quality"}
        return {**about, **{key: _round(value) for key, value in figures.items()}}

    def table(self) -> Iterator[str]:
        """Lines for a terminal."""
        quality = self.quality
        bound = "" if quality.divergence == "exact" else "  (a lower bound)"
        greedy = "not in the reference"
        if quality.greedy_same is not None:
            answers = _count(quality.greedy_answers, "answer")
            greedy = f"{quality.greedy_same:.1f} of {quality.greedy_tokens} tokens, {answers}"
        yield f"{self.bundle}, made by {self.maker} ({self.compiler}), on engine {self.engine}"
        for name, text in (
            ("tokens scored", f"{quality.positions} in {_count(quality.windows, 'window')} of {quality.window}"),
            ("perplexity", f"{quality.perplexity:.4f}  (x {quality.perplexity_ratio:.4f})"),
            ("  of the checkpoint", f"{quality.reference_perplexity:.4f}"),
            ("mean KLD", f"{quality.mean_kld:.6f}{bound}"),
            ("median KLD", f"{quality.median_kld:.6f}{bound}"),
            ("99.9 % KLD", f"{quality.kld_99_9:.6f}{bound}"),
            ("largest KLD", f"{quality.max_kld:.6f}{bound}"),
            ("same top token", f"{quality.top1_agreement:.2%}"),
            ("same greedy tokens", greedy),
            ("sha256 of the logits", quality.logits_sha256),
        ):
            yield f"  {name:<20} {text}"

    def require(self, max_kld: float | None, min_top1: float | None) -> None:
        """Raises CheckFailed if the mean divergence is above `max_kld` or the top-1 agreement below `min_top1`."""
        kld, top1 = self.quality.mean_kld, self.quality.top1_agreement
        if max_kld is not None and not kld <= max_kld:
            raise CheckFailed(f"{self.bundle} has a mean KLD of {kld:.6f}, expected at most {max_kld}")
        if min_top1 is not None and not top1 >= min_top1:
            raise CheckFailed(f"{self.bundle} has the same top token in {top1:.2%}, expected at least {min_top1:.2%}")


def evaluate(path: Path, reference: Path | None = None, loading: Loading = DEFAULTS) -> Evaluation:
    """Evaluates a bundle against reference logits: a file, or None for those in the bundle.

    Raises BadInput for an unusable bundle or reference, CheckFailed if the bundle fails verification.
    """
    bundle = loading.open(path)
    file = _reference(bundle) if reference is None else reference
    against = reference_logits.read(file)
    _expect_fit(bundle, against, file)
    model = loading.load(bundle)
    return Evaluation(
        quality=measure(model, against, loading.progress),
        bundle=bundle.name,
        manifest_sha256=sha256(path / MANIFEST),
        reference_sha256=sha256(file),
        maker=bundle.maker,
        compiler=bundle.compiler,
        engine=loading.engine,
    )


def measure(model: Model, reference: ReferenceLogits, progress: Show = unseen) -> Quality:
    """Evaluates a model whose context holds the reference's windows."""
    windows, length = reference.tokens.shape
    losses, divergences, same = [], [], []
    sequence, digest = Sequence(model), hashlib.sha256()
    for number, tokens in enumerate(reference.tokens.tolist()):
        sequence.truncate(0)
        done = 0
        for logits in sequence.score(tokens[:-1]):
            rows = slice(done, done + len(logits))
            digest.update(logits.astype("<f4").tobytes())
            logprobs = log_softmax(logits)
            losses.append(-np.take_along_axis(logprobs, reference.tokens[number, 1:][rows, None], axis=1)[:, 0])
            divergences.append(_divergence(reference, number, rows, logprobs))
            same.append(logits.argmax(axis=1) == reference.ids[number, rows, 0])
            done = rows.stop
        progress(Progress(number + 1, windows, "windows"))
    divergence = np.concatenate(divergences)
    answers = [_same_greedy(sequence, reference, number) for number in range(len(reference.continuations))]
    return Quality(
        positions=divergence.size,
        windows=windows,
        window=length,
        perplexity=_exp(np.concatenate(losses).mean()),
        reference_perplexity=_exp(-reference.following.mean(dtype=np.float64)),
        divergence="exact" if reference.exact else "lower bound",
        mean_kld=float(divergence.mean()),
        median_kld=float(np.median(divergence)),
        kld_99_9=float(np.quantile(divergence, 0.999)),
        max_kld=float(divergence.max()),
        top1_agreement=float(np.concatenate(same).mean()),
        greedy_answers=len(answers),
        greedy_tokens=reference.continuations.shape[1],
        greedy_same=sum(answers) / len(answers) if answers else None,
        logits_sha256=digest.hexdigest(),
    )


def log_softmax(logits: Logits) -> Doubles:
    """Natural logarithms of the probabilities, [n, vocab]. Raises CheckFailed if logits are not finite."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)
    if not np.isfinite(total).all():
        raise CheckFailed("the model returned logits that are not finite: it overflows or its files are damaged")
    return np.asarray(shifted - np.log(total))


def _divergence(reference: ReferenceLogits, window: int, rows: slice, ours: Doubles) -> Doubles:
    """KL(reference || ours) over the most likely tokens and the bucket of all others, [n]."""
    ids = reference.ids[window, rows].astype(np.int64)
    p, q = reference.logprobs[window, rows].astype(np.float64), np.take_along_axis(ours, ids, axis=1)
    found = (np.exp(p) * (p - q)).sum(axis=1)
    if not reference.exact:
        others = np.exp(ours)
        np.put_along_axis(others, ids, 0.0, axis=1)
        q_rest = np.log(np.maximum(others.sum(axis=1), np.finfo(np.float64).tiny))
        p_rest = reference.rest[window, rows].astype(np.float64)
        # an empty bucket of the reference adds nothing
        found += np.where(np.isneginf(p_rest), 0.0, np.exp(p_rest) * (np.maximum(p_rest, -1e3) - q_rest))
    return np.asarray(found)


def _same_greedy(sequence: Sequence, reference: ReferenceLogits, window: int) -> int:
    """The number of tokens of a greedy answer before the first one that differs from the reference."""
    expected = reference.continuations[window].tolist()
    sequence.truncate(0)
    ours = generate(sequence, reference.tokens[window, : reference.prompt].tolist(), Sampling(), len(expected))
    pairs = zip((token.id for token in ours), expected)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _reference(bundle: Bundle) -> Path:
    if reference_logits.NAME not in bundle.manifest["files"]:
        raise BadInput(
            f"{bundle.path} has no {reference_logits.NAME} to compare with\n"
            "Write it on a host with the checkpoint: axc reference --input_path CHECKPOINT --text FILE --bundle BUNDLE"
        )
    return bundle.path / reference_logits.NAME


def _expect_fit(bundle: Bundle, reference: ReferenceLogits, file: Path) -> None:
    """Raises BadInput if the reference is of another model, or its windows are too long for the bundle."""
    if reference.about["vocab_size"] != bundle.vocab_size:
        raise BadInput(
            f"{file} is of a vocabulary of {reference.about['vocab_size']}, the bundle has {bundle.vocab_size}: "
            "it was written from another checkpoint\n"
            "Write one from this bundle's checkpoint: "
            f"axc reference --input_path CHECKPOINT --text FILE --bundle {bundle.path}"
        )
    longest = max(reference.tokens.shape[1] - 1, reference.prompt + reference.continuations.shape[1] - 1)
    if longest > bundle.kv_cache_len:
        raise BadInput(
            f"{file} has windows of {reference.tokens.shape[1]} tokens, the bundle's context is {bundle.kv_cache_len}\n"
            f"Write it with `axc reference --window {bundle.kv_cache_len}`."
        )


def _exp(loss: float) -> float:
    return float(np.exp(loss))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _round(value: Any) -> Any:
    return float(f"{value:.8g}") if isinstance(value, float) else value
