"""Slots that share blocks of one pool: answers equal those of a cache of their own, whatever happens to the others."""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrun import kv_pool
from axrun.errors import CheckFailed
from axrun.format.bundle import Bundle
from axrun.job import Computed, Job, run_alone
from axrun.kv_pool import pool_of
from axrun.model import Model
from axrun.prompt_cache import PromptCache
from axrun.sampling import Sampling
from axrun.sampling.grammar import Compiler
from axrun.sequence import Sequence as TokenSequence
from axrun.serve.metrics import Metrics, ServerMetrics
from axrun.serve.order import Choice
from axrun.serve.scheduler import Scheduler
from axrun.serve.slots import Slot, allocate
from axrun.serve.turn import Ticket
from axrun.serve.writer import Piece, Writer
from axrun.speculation import Speculation
from axrun.text.tokenizer import Tokenizer

GREEDY = Sampling()
TOKENS, CONTEXT = 64, 255  # of a block; of a context, which has 4 blocks


@pytest.fixture(scope="module")
def model(bundle_s8: Path) -> Model:
    return Model.load(Bundle.open(bundle_s8), threads=1)


@pytest.fixture(scope="module")
def writer(bundle_s8: Path) -> Writer:
    return Writer(Tokenizer.open(Bundle.open(bundle_s8).hf), None, Speculation())


@pytest.fixture(scope="module")
def ids(hf_tokenizer: Any, heldout: str) -> tuple[int, ...]:
    return tuple(hf_tokenizer.encode(heldout)[:600])


def choice_of(ids: Sequence[int], length: int, echo: bool = False, sampling: Sampling = GREEDY) -> Choice:
    """An answer that ends with the context or after `length` tokens."""
    return Choice(0, list(ids), None, sampling, 7, length, (), frozenset(), 0 if echo else None, echo, True)


@pytest.fixture(scope="module")
def alone(model: Model, writer: Writer) -> Callable[..., str]:
    """The text of an answer with a cache of its own."""

    def text(ids: tuple[int, ...], length: int, sampling: Sampling) -> str:
        going: Any = writer.write(choice_of(ids, length, sampling=sampling), TokenSequence(model.another()))
        return "".join(piece.text for piece in run_alone(going))

    greedy = functools.lru_cache(None)(functools.partial(text, sampling=GREEDY))
    return lambda ids, length, sampling=GREEDY: (
        greedy(ids, length) if sampling is GREEDY else text(ids, length, sampling)
    )


class Asked:
    """A request, whose client hangs up after `hang_up` pieces."""

    def __init__(
        self,
        ids: Sequence[int],
        length: int,
        hang_up: int | None = None,
        echo: bool = False,
        sampling: Sampling = GREEDY,
    ) -> None:
        self.ids, self.length, self.hang_up, self.sampling = tuple(ids), length, hang_up, sampling
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.then: Callable[[], None] = lambda: None  # after the first piece
        self.ticket = Ticket(deque([choice_of(ids, length, echo, sampling)]), self._deliver, math.inf)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def reused(self) -> int:
        return self.pieces[-1].reused

    def _deliver(self, event: Any) -> None:
        if isinstance(event, Exception):
            self.error = event
        if not isinstance(event, Piece):
            return
        self.pieces.append(event)
        if len(self.pieces) == 1:
            self.then()
        if len(self.pieces) == self.hang_up:
            self.scheduler.cancel(self.ticket)

    scheduler: Scheduler


class Host:
    """A scheduler in this process, with `blocks` blocks for its slots."""

    def __init__(self, model: Model, writer: Writer, slots: int, blocks: int) -> None:
        pool = pool_of(model.decoder, slots)
        assert pool is not None
        assert (pool.tokens, pool.most) == (TOKENS, 4)
        self.slots = allocate(model, slots, limit=blocks * pool.block_bytes)
        self.metrics = ServerMetrics(["tiny"])
        self.ended, self.most_shared, self.rows = threading.Event(), 0, 0
        self.scheduler = Scheduler(
            lambda: (self.slots, writer.write), 100, Metrics(self.metrics, "tiny"), self.ended.set
        )
        self.runs: list[int] = []
        compute = self.scheduler._compute

        def watched(jobs: Sequence[Job]) -> Sequence[Computed | Exception]:
            self.runs.append(len(jobs))
            self.most_shared = max(self.most_shared, self.pool.shared)
            results = compute(jobs)
            self.rows += sum(len(result.hidden) for result in results if isinstance(result, Computed))
            return results

        self.scheduler._compute = watched  # type: ignore[method-assign]
        self.scheduler.state = "ok"  # so that requests are queued before the first run

    @property
    def pool(self) -> Any:
        return self.slots[0].pool

    @property
    def suspended(self) -> float:
        lines = self.metrics.text().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("axrun_suspended_total"))

    def ask(self, *asked: Asked) -> None:
        for one in asked:
            one.scheduler = self.scheduler
            self.scheduler.submit(one.ticket)

    def run(self) -> None:
        """Answers all that was asked, and checks that the pool is whole."""
        self.scheduler.start()
        waiting = self.scheduler
        with waiting._changed:
            pass
        end = threading.Event()
        for _ in range(60_000):
            if not waiting._turns and not waiting._waiting:
                break
            assert not self.ended.is_set(), waiting.failure
            end.wait(0.002)
        self.scheduler.stop(0)
        self.scheduler.join(60)
        assert self.scheduler.failure is None
        blocks = {block for slot in self.slots for block in slot.blocks}
        assert self.pool.free == self.pool.count - len(blocks)
        for slot in self.slots:
            assert slot.held == slot.length
            slot.reset()
        assert self.pool.available == self.pool.count


def expect_right(asked: Sequence[Asked], alone: Callable[..., str]) -> None:
    for one in asked:
        assert one.error is None
        text = alone(one.ids, one.length, one.sampling)
        assert text.startswith(one.text) if one.hang_up else one.text == text


def test_a_busy_slot_gives_its_prefix(model: Model, writer: Writer, ids: Any, alone: Any) -> None:
    """Also if it is cut off while another one reads the shared blocks."""
    for hang_up in (None, 4):
        host = Host(model, writer, 3, 12)
        first, second = Asked(ids[:150], 80, hang_up), Asked([*ids[:140], *ids[200:230]], 50)
        first.then = functools.partial(host.ask, second)
        host.ask(first)
        host.run()
        expect_right([first, second], alone)
        assert second.reused == 140, "the rest of the last block is copied"
        assert host.most_shared == 2


def test_a_prefix_that_several_begin_with_is_read_once(model: Model, writer: Writer, ids: Any, alone: Any) -> None:
    host = Host(model, writer, 8, 32)
    asked = [Asked([*ids[:150], *ids[200 + 9 * i : 220 + 9 * i]], 9) for i in range(8)]
    host.ask(*asked)
    host.run()
    expect_right(asked, alone)
    assert [one.reused for one in asked] == [0, *[150] * 7]
    assert host.most_shared == 2
    assert host.rows < 170 + 7 * 20 + 8 * 9 + 100, "prompts, answers and wrong guesses"


def test_a_reader_that_hangs_up_does_not_stop_those_that_wait_for_it(
    model: Model, writer: Writer, ids: Any, alone: Any
) -> None:
    host = Host(model, writer, 4, 16)
    other = Asked(ids[300:305], 60)
    readers = [Asked([*ids[:200], 5 + i], 5) for i in range(3)]
    host.ask(other, *readers)
    compute = host.scheduler._compute

    def hung_up(jobs: Sequence[Job]) -> Sequence[Computed | Exception]:
        if len(host.runs) == 4:
            assert 0 < host.slots[1].length < 200
            host.scheduler.cancel(readers[0].ticket)
        return compute(jobs)

    host.scheduler._compute = hung_up  # type: ignore[method-assign]
    host.run()
    assert readers[0].pieces == []
    expect_right([other, *readers[1:]], alone)
    assert 0 < readers[1].reused < 200
    assert readers[2].reused == 200


def test_scored_prompts_are_computed_anew(model: Model, writer: Writer, ids: Any, alone: Any) -> None:
    host = Host(model, writer, 3, 12)
    asked = [Asked(ids[:150], 9), Asked(ids[:150], 9, echo=True)]
    host.ask(*asked)
    host.run()
    assert asked[1].reused == 0
    assert asked[1].text.endswith(alone(ids[:150], 9))


@pytest.mark.parametrize("blocks", [4, 5, 9])
def test_answers_that_do_not_fit_together_all_end(
    model: Model, writer: Writer, ids: Any, alone: Any, blocks: int
) -> None:
    """Each fills the context."""
    host = Host(model, writer, 6, blocks)
    asked = [Asked(ids[90 * i : 90 * i + 20 + 30 * i], 999) for i in range(6)]
    host.ask(*asked)
    host.run()
    expect_right(asked, alone)
    assert 0 < host.suspended <= 4
    assert max(host.runs) > 1


def test_a_suspended_answer_keeps_the_state_of_its_sampler(
    model: Model, writer: Writer, bundle_s8: Path, ids: Any, alone: Any
) -> None:
    """Random numbers, tokens of the answer so far, place in a grammar."""
    bundle = Bundle.open(bundle_s8)
    digits = {"type": "array", "items": {"type": "integer"}, "minItems": 200}
    grammar = Compiler(Tokenizer.open(bundle.hf), bundle.vocab_size).schema(digits)
    host = Host(model, writer, 6, 5)
    samplings = [
        Sampling(1.2),
        Sampling(1.0, frequency_penalty=0.5, presence_penalty=0.5),
        Sampling(repetition_penalty=1.3, dry_multiplier=1.0),
        Sampling(0.8, grammar=grammar),
    ]
    asked = [Asked(ids[70 * i : 70 * i + 40], 150, sampling=one) for i, one in enumerate([GREEDY, *samplings])]
    host.ask(*asked)
    host.run()
    expect_right(asked, alone)
    assert host.suspended >= len(samplings)


def test_many_short_answers_share_the_memory_of_one_context(model: Model, writer: Writer, ids: Any, alone: Any) -> None:
    host = Host(model, writer, 4, 4)
    asked = [Asked(ids[30 * i : 30 * i + 20], 20) for i in range(12)]
    host.ask(*asked)
    host.run()
    expect_right(asked, alone)
    assert max(host.runs) == 4
    assert host.suspended == 0


@pytest.mark.parametrize("first", [0, 1, 40])
def test_only_one_answer_fails_if_the_system_refuses_a_mapping(
    model: Model, writer: Writer, ids: Any, alone: Any, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """As at vm.max_map_count, which cannot be lowered for one process. `first`: mappings that succeed before."""
    host = Host(model, writer, 4, 16)
    asked = [Asked(ids[100 * i : 100 * i + 40], 60) for i in range(4)]
    made, mmap = 0, kv_pool._mmap

    def refusing(start: int | None, size: int, access: int, flags: int, file: int, offset: int) -> int:
        nonlocal made
        made += file >= 0
        if file >= 0 and made == first + 1:
            raise CheckFailed("mmap: Cannot allocate memory")
        return mmap(start, size, access, flags, file, offset)

    monkeypatch.setattr(kv_pool, "_mmap", refusing)
    host.ask(*asked)
    host.run()
    failed = [one for one in asked if one.error]
    assert len(failed) == 1
    assert "Cannot allocate memory" in str(failed[0].error)
    expect_right([one for one in asked if one not in failed], alone)


def test_an_answer_begins_when_its_prompt_fits_beside_the_others(
    model: Model, writer: Writer, ids: Any, alone: Any
) -> None:
    host = Host(model, writer, 4, 8)
    asked = [Asked(ids[100 * i : 100 * i + 150], 20) for i in range(4)]
    host.ask(*asked)
    host.run()
    expect_right(asked, alone)
    assert host.suspended == 0
    assert max(host.runs) == 2


def test_the_first_answer_is_never_suspended_and_the_last_may_hang_up(
    model: Model, writer: Writer, ids: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspended: list[Slot] = []

    def suspend(slot: Slot, give_back: Callable[[Slot], None] = Slot.suspend) -> None:
        suspended.append(slot)
        give_back(slot)

    monkeypatch.setattr(Slot, "suspend", suspend)
    host = Host(model, writer, 3, 6)
    asked = [Asked(ids[100 * i : 100 * i + 50], 999) for i in range(3)]
    host.ask(*asked)
    compute = host.scheduler._compute
    hung_up: list[int] = []

    def watched(jobs: Sequence[Job]) -> Sequence[Computed | Exception]:
        for turn in host.scheduler._turns:
            if turn.lost and turn.ticket is asked[2].ticket and not hung_up:
                hung_up.append(len(asked[2].pieces))
                host.scheduler.cancel(turn.ticket)
        return compute(jobs)

    host.scheduler._compute = watched  # type: ignore[method-assign]
    host.run()
    assert host.slots[0] not in suspended
    assert {slot: suspended.count(slot) for slot in host.slots[1:]} == {host.slots[1]: 1, host.slots[2]: 1}
    expect_right(asked[:2], alone)
    assert hung_up == [len(asked[2].pieces)]
    assert 0 < hung_up[0] < len(alone(asked[2].ids, 999))


def test_a_request_that_waits_for_a_prefix_may_lose_the_blocks_of_its_slot(
    model: Model, writer: Writer, ids: Any, alone: Any
) -> None:
    host = Host(model, writer, 2, 5)
    before = Asked(ids[:100], 3)
    reader, waiting = (Asked([*ids[:30], *ids[300:480], last], 40) for last in (5, 6))
    before.then = functools.partial(host.ask, reader, waiting)
    host.ask(before)
    host.run()
    expect_right([before, reader, waiting], alone)
    assert (reader.reused, waiting.reused) == (30, 210)


def test_suspended_answers_get_a_common_prefix_back_once(model: Model, writer: Writer, ids: Any, alone: Any) -> None:
    host = Host(model, writer, 3, 5)
    asked = [Asked(ids[:70], 999), *(Asked([*ids[300:390], 5 + i], 60) for i in range(2))]
    host.ask(*asked)
    host.run()
    expect_right(asked, alone)
    assert 0 < host.suspended <= 4


def test_an_idle_slot_loses_its_blocks_first(model: Model, writer: Writer, ids: Any, alone: Any) -> None:
    host = Host(model, writer, 3, 5)
    old, new, busy = Asked(ids[:100], 3), Asked(ids[100:120], 3), Asked(ids[200:330], 110)
    after = [Asked([*ids[:100], 7], 2), Asked([*ids[100:120], 7], 2)]
    old.then = functools.partial(host.ask, new)
    new.then = functools.partial(host.ask, busy)
    busy.then = functools.partial(host.ask, after[1])
    after[1].then = functools.partial(host.ask, after[0])
    host.ask(old)
    host.run()
    expect_right([old, new, busy, *after], alone)
    assert after[1].reused == 20


def test_an_idle_slot_keeps_the_prefix_that_an_answer_begins_with(
    model: Model, writer: Writer, ids: Any, alone: Any
) -> None:
    """Room is made by one that was used later."""
    host = Host(model, writer, 3, 6)
    oldest, holder, newest = Asked(ids[200:220], 3), Asked(ids[:150], 3), Asked(ids[400:500], 3)
    asked = Asked([*ids[:100], *ids[500:600]], 9)
    oldest.then = functools.partial(host.ask, holder)
    holder.then = functools.partial(host.ask, newest)
    newest.then = functools.partial(host.ask, asked)
    host.ask(oldest)
    host.run()
    expect_right([oldest, holder, newest, asked], alone)
    assert asked.reused == 100


def test_a_prefix_that_cannot_be_shared_is_computed(
    model: Model, writer: Writer, ids: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise CheckFailed("mmap: Cannot allocate memory")

    monkeypatch.setattr(kv_pool.Pool, "share", refuse)
    host = Host(model, writer, 2, 8)
    first, second = Asked(ids[:150], 30), Asked([*ids[:140], *ids[200:230]], 30)
    first.then = functools.partial(host.ask, second)
    host.ask(first)
    host.run()
    expect_right([first, second], alone)
    assert second.reused == 0


def test_the_prompt_cache_takes_what_there_is_room_for(
    model: Model, bundle_s8: Path, ids: Any, alone: Any, tmp_path: Path
) -> None:
    cache = PromptCache(tmp_path, "a", 1 << 30, print)
    writer = Writer(Tokenizer.open(Bundle.open(bundle_s8).hf), cache, Speculation())
    texts = [ids[:200], ids[200:400], ids[400:600]]
    for reused in (0, 192):
        host = Host(model, writer, 3, 5)
        asked = [Asked(text, 30) for text in texts]
        host.ask(*asked)
        host.run()
        expect_right(asked, alone)
        assert max(one.reused for one in asked) == reused
    host = Host(model, writer, 2, 4)
    before, stored = Asked(ids[40:240], 9), Asked(ids[:200], 9)
    before.then = functools.partial(host.ask, stored)
    host.ask(before)
    host.run()
    expect_right([before, stored], alone)
    assert stored.reused == 192, "an idle slot loses its blocks to those on disk"
    cache.close()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mix_of_answers(model: Model, writer: Writer, ids: Any, alone: Any, data: st.DataObject) -> None:
    """Common prefixes, hang-ups, little room."""
    draw = data.draw
    host = Host(model, writer, draw(st.integers(1, 6)), draw(st.integers(4, 14)))
    asked = []
    for _ in range(draw(st.integers(2, 10))):
        start, shared = draw(st.sampled_from([0, 300])), draw(st.sampled_from([0, 64, 100, 170]))
        own = draw(st.integers(0, 7))
        prompt = (*ids[start : start + shared], *ids[30 * own + 9 : 30 * own + 9 + draw(st.sampled_from([1, 20, 80]))])
        asked.append(Asked(prompt, draw(st.sampled_from([1, 9, 60, 999])), draw(st.sampled_from([None, None, 1, 5]))))
    later = draw(st.integers(0, len(asked) - 1))
    for one, after in zip(asked[:later], asked[-later:], strict=False):
        one.then = functools.partial(host.ask, after)
    host.ask(*asked[: len(asked) - later])
    host.run()
    expect_right([one for one in asked if hasattr(one, "scheduler")], alone)
