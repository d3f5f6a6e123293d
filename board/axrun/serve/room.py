"""Room for the keys and values of answers, in the pool of blocks that the slots share.

A prefix that another slot holds is taken from there; one that another answer is reading is waited for. If blocks run
out, idle slots lose theirs, the least recently used one first; then the answer that began last is suspended: its rows
are computed again when there is room. The answer that began first always goes on, so all of them end. None of this
changes an answer, since the rows of a token are always the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from axrun.job import Job
from axrun.kv_pool import NoRoom, Pool
from axrun.sequence import common_prefix
from axrun.serve.slots import Slot
from axrun.serve.turn import Task, Turn


class Room:
    """The pool of the slots of a scheduler; without a pool, there is always room.

    `turns` are the answers that are being generated, in the order in which they began.
    """

    def __init__(self, slots: Sequence[Slot], turns: Sequence[Turn], suspended: Callable[[], None]) -> None:
        """`suspended` is called when an answer is suspended."""
        self._slots, self._turns, self._suspended = slots, turns, suspended
        self._pool = slots[0].pool

    @property
    def figures(self) -> dict[str, int]:
        """The numbers of blocks: all, those in use, those with several users."""
        pool = self._pool
        if pool is None:
            return {"kv_blocks": 0, "kv_blocks_used": 0, "kv_blocks_shared": 0}
        return {"kv_blocks": pool.count, "kv_blocks_used": pool.count - pool.free, "kv_blocks_shared": pool.shared}

    def admits(self, choice: Task) -> bool:
        """Whether a further answer can begin now without suspending others soon."""
        pool = self._pool
        if pool is None or not self._turns:
            return True
        return not any(turn.lost for turn in self._turns) and self._fits(pool, choice.ids, self._turns)

    def begins(self, turn: Turn) -> bool:
        """Gives a turn the prefix that another slot holds. False: it waits for one that another turn is reading."""
        pool, ids = self._pool, turn.choice.ids[:-1]
        if pool is None or turn.choice.scores_prompt:
            return True
        if turn.follows:
            leader, count = turn.follows
            if leader in self._turns and not leader.lost and leader.slot.held < count:
                return False
        own = turn.slot.common(ids)
        donor, best = self._donor(turn.slot, ids)
        before = [other for other in self._turns[: self._turns.index(turn)] if not other.lost]
        reading = [(other, common_prefix(ids, other.target)) for other in before]
        promised = [(other, count) for other, count in reading if count >= max(own, best) + pool.tokens]
        if promised:
            turn.follows = max(promised, key=lambda found: found[1])
            return False
        turn.follows = None
        turn.slot.truncate(own)
        needed = _blocks(pool, len(ids) + 1) - max(own, best) // pool.tokens
        while pool.available < needed and self._drop_idle(donor if best > own else None):
            pass
        if best > own:
            turn.slot.take(donor, ids, best)
        return True

    def resumes(self, turn: Turn) -> bool:
        """Whether a turn that has lost rows gets them back now."""
        pool, first = self._pool, next(other for other in self._turns if other.lost)
        assert pool is not None
        others = [other for other in self._turns if not other.lost]
        if turn is not first or (turn is not self._turns[0] and not self._fits(pool, turn.slot.ids, others)):
            return False
        donor, best = self._donor(turn.slot, turn.slot.ids)
        if best > turn.slot.held:
            turn.slot.take(donor, turn.slot.ids, best)
        return True

    def runs(self, turn: Turn, job: Job) -> bool:
        """Makes room for a job. False: it has to wait, for answers that began earlier.

        Raises CheckFailed if the system has no memory for its rows.
        """
        if self._pool is None:
            return True
        decoder = turn.slot.model.decoder
        while job.sequence.length <= decoder.cache.length:  # else it was suspended for the sake of another job
            try:
                decoder.cache.prepare(job.sequence.length, min(len(job.tokens), decoder.most))
                return True
            except NoRoom:
                if not self._drop_idle() and not self._suspend(turn):
                    return False
        return False

    def _fits(self, pool: Pool, ids: Sequence[int], others: Sequence[Turn]) -> bool:
        """Whether tokens fit beside other turns that go on for a while."""
        used = len({block for turn in others for block in turn.slot.blocks})
        left = pool.count - used - sum(_claim(pool, turn) for turn in others)
        needed = _blocks(pool, len(ids) + 1)
        return needed <= left or needed - max(common_prefix(ids, turn.target) for turn in others) // pool.tokens <= left

    def _donor(self, slot: Slot, ids: Sequence[int]) -> tuple[Slot, int]:
        """The other slot that holds the longest prefix, and its length."""
        others = [(other, common_prefix(ids, other.ids[: other.held])) for other in self._slots if other is not slot]
        return max(others, key=lambda found: found[1], default=(slot, 0))

    def _drop_idle(self, but: Slot | None = None) -> bool:
        """Takes the blocks of the idle slot that was used least recently."""
        busy = [turn.slot for turn in self._turns]
        idle = [slot for slot in self._slots if slot.blocks and slot not in busy and slot is not but]
        if idle:
            min(idle, key=lambda slot: slot.used).reset()
        return bool(idle)

    def _suspend(self, turn: Turn) -> bool:
        """Takes the blocks of the turn that began last, if it began after `turn`."""
        later = [other for other in self._turns[self._turns.index(turn) + 1 :] if other.slot.blocks]
        if later and later[-1].job is None:  # it has not begun
            later[-1].slot.reset()
        elif later:
            later[-1].slot.suspend()
            self._suspended()
        return bool(later)


def _blocks(pool: Pool, tokens: int) -> int:
    return -(-tokens // pool.tokens)


def _claim(pool: Pool, turn: Turn) -> int:
    """Blocks that a turn will need soon: those of the rest of its prompt, or one."""
    promised = turn.follows[1] // pool.tokens if turn.follows else 0
    return max(_blocks(pool, len(turn.target) + 1) - len(turn.slot.blocks) - promised, 1)
