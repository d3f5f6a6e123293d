"""Computes figures.npz, the float32 reference values by transformers that `axrun doctor` compares a bundle with.

board/axrun/doctor/figures.py describes the file and its arrays.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc import VERSION, walk
from axc.bundle import add_file
from axc.tokenizer_comparison import CONVERSATIONS, PLAIN
from axc.weights import Source
from axrun.agreement import NOISE
from axrun.doctor import spelling
from axrun.doctor.constants import EPSILON, checksum
from axrun.doctor.figures import MOST_BYTES, NAME, TABLE_ROWS, WALK, Figures, packed, picked
from axrun.doctor.text import sections
from axrun.format.bundle import Bundle
from axrun.format.dtypes import FLOATS, from_float32, to_float32
from axrun.progress import Progress, Show
from axrun.text.template import ChatTemplate

if TYPE_CHECKING:
    from axc.reference import Reference

Floats = NDArray[np.float32]
Say = Callable[[str], None]

BASE = 16  # real rows per layer, from which inputs and histories are sampled
SEED = 11  # of the sampling
TABLE = 64  # rows of the embedding table
POST = 2  # rows of logits
ANSWER = 16  # tokens of the greedy answer
ASKED = 24  # most tokens of its prompt
SPREAD = 256  # evenly spread vocabulary ids whose logits are stored per token of the answer
LIKELIEST = 8  # top ids stored in addition


def write(
    folder: Path,
    checkpoint: Path,
    reference: Reference,
    ids: Sequence[int],
    weights: Mapping[str, Source],
    show: Show,
    say: Say,
    graphs: Mapping[str, Any] | None = None,
) -> Figures | None:
    """Writes the figures into a bundle and its manifest; reports their content, or why there are none.

    `graphs`: the graphs that this compiler writes for the bundle's model and flags.
    """
    try:
        bundle = Bundle.open(folder)
        figures = compute(reference, bundle, ids, weights, {**text(checkpoint), **_stop_ids(bundle)}, show)
        figures = dataclasses.replace(figures, about={**figures.about, "graphs": graphs}) if graphs else figures
    except NoFigures as reason:
        say(f"no {NAME} for axrun doctor: {reason}")
        return None
    content = figures.encode()
    add_file(folder, NAME, content)
    visits, probes = len(figures.visits), len(figures.probes)
    say(f"{NAME} for axrun doctor: {visits} runs of each layer, {probes} tokens, {len(content):,} bytes")
    return figures


class NoFigures(Exception):
    """There are no figures for this model: its layers cache something other than K and V of one width."""


@dataclass(frozen=True)
class Asked:
    """Visits (group, start, count), and the positions whose rows are stored for each."""

    visits: list[tuple[int, int, int]]
    probes: list[tuple[int, int]]


def compute(
    reference: Reference,
    bundle: Bundle,
    ids: Sequence[int],
    weights: Mapping[str, Source],
    text: dict[str, Any],
    show: Show,
) -> Figures:
    """Computes the figures of a bundle. `ids` are tokens of a real text, `weights` the axmodels' sources by name.

    Raises NoFigures, BadInput.
    """
    import transformers

    hidden_type = bundle.hidden_state_type
    cache = reference.empty_cache()
    trace = reference.trace(np.array(ids[: BASE + 1], np.int64), cache)
    rows = reference.cached_rows(cache)
    heads = [layer.keys.shape[1] for layer in cache.layers] if rows is not None else []
    if rows is None or any(part.shape[1] != bundle.kv_size for pair in rows for part in pair):
        raise NoFigures("the layers cache something other than K and V of one width")
    base = slice(1, None) if len(ids) > 1 else slice(None)  # the first token's rows are atypical
    carried = FLOATS[hidden_type]
    hidden = np.stack([from_float32(part[base], carried) for part in trace.inputs])
    keys, values = (np.stack([from_float32(pair[i][base], carried) for pair in rows]) for i in (0, 1))
    asked = plan(bundle)
    positions = max(start + count for _, start, count in asked.visits)
    draw = np.random.default_rng(SEED)
    given = draw.integers(0, hidden.shape[1], positions).astype(np.uint8)
    kept = draw.integers(0, keys.shape[1], positions).astype(np.uint8)
    updates, news = _layers(reference, bundle, asked, (hidden, keys, values), (given, kept), heads, show)
    answer = _answer(reference, bundle, ids)
    table = reference.table()[: bundle.vocab_size]
    if len(table) < bundle.vocab_size:
        raise NoFigures(f"its embedding table has {len(table)} rows, the vocabulary {bundle.vocab_size}")
    exact = hidden_type == "fp32"
    post_hidden, post_logits = _post(trace, exact, carried)
    figures = Figures(
        hidden=hidden,
        keys=keys,
        values=values,
        given=given,
        kept=kept,
        visits=np.array(asked.visits, np.int32),
        probes=np.array(asked.probes, np.uint32),
        **_named("updates", packed(updates, exact)),
        **_named("new_keys", packed(news[0], exact)),
        **_named("new_values", packed(news[1], exact)),
        **_table(table, draw),
        post_hidden=post_hidden,
        **_named("post_logits", post_logits),
        **answer,
        about={
            "hidden_state_type": hidden_type,
            "vocab_size": bundle.vocab_size,
            "exact": sorted(name for name in NOISE if reference.exact_in(name)),
            "text": text,
            **_constants(reference, weights),
            "tools": {"axc": VERSION, "transformers": transformers.__version__},
        },
    )
    nbytes = sum(value.nbytes for value in vars(figures).values() if isinstance(value, np.ndarray))
    if nbytes > MOST_BYTES // 2:
        raise NoFigures(f"they would take {nbytes:,} bytes, more than {MOST_BYTES // 2:,}")
    return figures


def plan(bundle: Bundle) -> Asked:
    """Visits of every prefill group after a full and an odd history, of decode at several positions, and of a walk."""
    context = bundle.kv_cache_len
    visits: list[tuple[int, int, int]] = []
    for group in bundle.groups:
        most = min(group.history, context - 1)
        starts = {most, most // 2 | 1} if group.history else {0}
        if group.tokens == 1:
            starts |= {0, min(1, most)}
        visits += [(group.index, at, min(group.tokens, context - at)) for at in sorted(starts) if at <= most]
    count = walk.length(bundle)
    visits.append((WALK, 0, count))
    probes = [(visit, at) for visit in range(len(visits)) for at in _places(bundle, *visits[visit])]
    return Asked(visits, probes)


def _places(bundle: Bundle, group: int, start: int, count: int) -> list[int]:
    """The first, middle and last position of a visit; for the walk also those around every group boundary."""
    places = {start, start + count // 2, start + count - 1}
    if group == WALK:
        borders = {entry.history for entry in bundle.groups if entry.tokens > 1} | {bundle.prefill_len}
        places |= {border + step for border in borders for step in (-1, 0)}
    return sorted(place for place in places if start <= place < start + count)


def _layers(
    reference: Reference,
    bundle: Bundle,
    asked: Asked,
    base: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    picks: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    heads: list[int],
    show: Show,
) -> tuple[Floats, tuple[Floats, Floats]]:
    """Each layer's update at each probe [L, P, H], and its new K and V rows [L, P, D]."""
    (hidden, keys, values), (given, kept) = base, picks
    hidden_type, layers = bundle.hidden_state_type, bundle.layers
    dtype, probes = FLOATS[hidden_type], np.array(asked.probes)
    updates = np.zeros((layers, len(probes), bundle.hidden_size), np.float32)
    news = [np.zeros((layers, len(probes), bundle.kv_size), np.float32) for _ in range(2)]
    for visit, (_, start, count) in enumerate(asked.visits):
        show(Progress(visit + 1, len(asked.visits), "figures of the layers"))
        rows = [to_float32(part[given[start : start + count]], dtype) for part in hidden]
        history = [picked(k, v, kept[:start], hidden_type) for k, v in zip(keys, values, strict=True)]
        outputs, made = reference.run_layers(rows, history, heads)
        if len(outputs) != layers or len(made) != layers:
            raise NoFigures("transformers does not run each decoder layer once")
        wanted = np.flatnonzero(probes[:, 0] == visit)
        inside = probes[wanted, 1] - start
        for layer in range(layers):
            updates[layer, wanted] = outputs[layer][inside] - rows[layer][inside]
            for index in (0, 1):
                news[index][layer, wanted] = made[layer][index][inside]
    return updates, (news[0], news[1])


def _constants(reference: Reference, weights: Mapping[str, Source]) -> dict[str, Any]:
    """Checksums of the vectors by name, and the norms' epsilon if all share one."""
    epsilons = {float(getattr(module, "variance_epsilon", 0)) for module in reference.model.modules()} - {0.0}
    vectors = {
        name: checksum(source.rows(reference, 0, source.shape[0]))
        for name, source in weights.items()
        if len(source.shape) == 1
    }
    return {"vectors": vectors, **({EPSILON: epsilons.pop()} if len(epsilons) == 1 else {})}


def _stop_ids(bundle: Bundle) -> dict[str, Any]:
    """The stop ids found by the build."""
    listed = bundle.manifest.get("text", {}).get("stop_ids")
    return {"stop_ids": sorted(map(int, listed))} if isinstance(listed, dict) else {}


def text(checkpoint: Path) -> dict[str, Any]:
    """Texts and conversations encoded by transformers with the checkpoint's files; empty without a tokenizer."""
    from axc.reference import Refused, tokenizer

    try:
        theirs = tokenizer(checkpoint)
    except Refused:
        return {}
    texts = []
    for line in PLAIN:
        ids = list(theirs(line)["input_ids"])
        back = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append({"text": line, "ids": ids, "decoded": back})
    backend = getattr(theirs, "backend_tokenizer", None)
    vocabulary: dict[str, Any] = {} if backend is None else {"vocabulary": spelling.vocabulary(backend)}
    if (checkpoint / "tokenizer.json").is_file():
        vocabulary["sections"] = sections(checkpoint / "tokenizer.json")
    source = theirs.chat_template
    template = ChatTemplate.find(checkpoint)
    if template is None or not isinstance(source, str) or "strftime_now" in source:
        return {**vocabulary, "texts": texts, "conversations": [], "template": source is not None}
    conversations = []
    for name, (messages, given) in CONVERSATIONS.items():
        try:
            prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
        except Exception:  # a template can raise anything
            prompt = None
        conversations.append({"name": name, "messages": messages, "given": given, "prompt": prompt})
    vocabulary["template_sum"] = zlib.crc32(source.encode("utf-8", "surrogatepass"))
    return {**vocabulary, "texts": texts, "conversations": conversations, "template": True}


def _table(table: Any, draw: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Rows of the embedding table, rounded to bfloat16 by torch, and checksums of every TABLE_ROWS rows."""
    count = len(table)
    ids = np.unique(np.concatenate([draw.integers(0, count, TABLE), [0, count // 2, count - 1]]))
    sums = []
    for start in range(0, count, TABLE_ROWS):
        sums.append(zlib.crc32(_bfloat16(table[start : start + TABLE_ROWS]).tobytes()))
    rows = np.concatenate([_bfloat16(table[int(token) : int(token) + 1]) for token in ids])
    return {"table_ids": ids.astype(np.uint32), "table_rows": rows, "table_sums": np.array(sums, np.uint32)}


def _bfloat16(rows: Any) -> NDArray[np.uint16]:
    import torch

    return np.asarray(rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16).astype("<u2"))


def _post(trace: Any, exact: bool, carried: str) -> tuple[NDArray[Any], tuple[NDArray[Any], Floats]]:
    """The last layer's output for a few tokens, and their logits."""
    last = slice(len(trace.logits) - POST, None)
    return from_float32(trace.outputs[-1][last], carried), packed(trace.logits[last], exact)


def _answer(reference: Reference, bundle: Bundle, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
    """A prompt from the text, its greedy answer, and logits of each answer token."""
    room = bundle.kv_cache_len - ANSWER
    asked = np.array(ids[1 : 1 + max(1, min(ASKED, room, len(ids) - 1))], np.uint32)
    tokens = min(ANSWER, bundle.kv_cache_len - len(asked))
    found = reference.generate(asked[None].astype(np.int64), tokens, keep_logits=True)
    logits = found.logits[0]
    step = max(1, bundle.vocab_size // SPREAD)
    top = np.argpartition(logits, -min(LIKELIEST, bundle.vocab_size), axis=1)[:, -LIKELIEST:]
    wanted = np.unique(np.concatenate([np.arange(0, bundle.vocab_size, step), top.reshape(-1), found.tokens[0]]))
    return {
        "asked": asked,
        "answer": found.tokens[0].astype(np.uint32),
        "answer_ids": wanted.astype(np.uint32),
        "answer_logits": logits[:, wanted].astype(np.float32),
    }


def _named(name: str, pair: tuple[NDArray[Any], Floats]) -> dict[str, NDArray[Any]]:
    return {name: pair[0], f"{name}_scale": pair[1]}
