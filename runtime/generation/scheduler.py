"""Who runs next. Pure: no thread, no clock, no memory; the same calls give the same plans.

A step is at most `chunk_tokens` tokens of work: one for each decoding row, the rest for prompts, so that a long prompt
is computed in chunks between the tokens of running streams and stalls them by a bounded time. Prompts take turns:
every other chunk goes to the prompt that came first, the one between to the prompt that has had least. So a short
prompt does not wait for a long one, and the oldest always gets on. Whoever waits for a row is served in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import Unavailable
from runtime.generation.cache import Slot, SlotCache, positions
from runtime.generation.grouping import pool_for, regroup
from runtime.generation.request import Tokens
from runtime.generation.sequence import TokenSequence
from runtime.step import Batch, Copy, Row

_SMALLEST_CHUNK = 16  # of a prompt, beside however many decoding rows
_SCORED_CHUNK = 64  # of a prompt whose logits are wanted: a row of a vocabulary of 128k is half a megabyte


@dataclass(frozen=True, eq=False)
class Work:
    """A batch and whose rows it computes. `last`: the logits choose a token; otherwise the prompt goes on."""

    batch: Batch
    sequences: list[TokenSequence]
    last: bool


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What one step does, in this order. `expired` have waited too long, and are gone.

    `encodes` are sources of rows that are new, each where its row lies after `copies`.
    """

    expired: list[TokenSequence]
    copies: list[Copy]
    encodes: list[tuple[Row, Tokens]]
    work: list[Work]


class Scheduler:
    """Holds every request under way. `encoder`: prompts go to an encoder, and rows share nothing. `every`: the executor
    gives the logits of each token of a chunk, so prompts that are scored need not go token by token."""

    def __init__(
        self,
        cache: SlotCache,
        *,
        chunk_tokens: int,
        queue_size: int,
        call_cost: int = 0,
        stages: int = 1,
        encoder: bool = False,
        every: bool = False,
    ) -> None:
        self.cache = cache
        self.waiting: deque[TokenSequence] = deque()
        self.running: dict[int, TokenSequence] = {}
        self.reused_tokens = 0
        self._chunk_tokens, self._queue_size = chunk_tokens, queue_size
        self._call_cost, self._stages, self._encoder = call_cost, stages, encoder
        self._scored_chunk = _SCORED_CHUNK if every else 1
        self._oldest_first = True
        self._regroup = False

    def add(self, sequence: TokenSequence) -> None:
        """Raises Unavailable when too many wait already."""
        if len(self.waiting) >= self._queue_size:
            raise Unavailable(f"{self._queue_size} requests wait already; try again later")
        self.waiting.append(sequence)

    def find(self, request: int) -> TokenSequence | None:
        waiting = (sequence for sequence in self.waiting if sequence.request.id == request)
        return self.running.get(request) or next(waiting, None)

    def remove(self, sequence: TokenSequence, *, keep: bool = True) -> None:
        """The request has ended, however it did. Its row is free for others, and keeps its tokens until then."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        del self.running[sequence.request.id]
        # Rows with sources share nothing, so nobody would use what they leave.
        self.cache.close(sequence.slot, keep=keep and not sequence.request.probe and not self._encoder)
        sequence.slot, self._regroup = None, True

    def clear(self) -> list[TokenSequence]:
        """Ends every running request, because the caches are gone; returns them. Who waits goes on waiting."""
        ended = list(self.running.values())
        for sequence in ended:
            sequence.slot = None
        self.running.clear()
        self.cache.clear()
        return ended

    def plan(self, now: float) -> StepPlan:
        expired = self._expire(now)
        self._activate()
        self._make_room()
        admitted = self._admit()
        decodes = self._decodes()
        budget = max(self._chunk_tokens - sum(len(work.sequences) for work in decodes), _SMALLEST_CHUNK)
        work = decodes + self._prefills(budget)
        if not work:  # nothing is carried out; what rows that ended left to copy waits for the next plan
            assert not admitted, "a prompt was admitted, and no chunk of any planned"
            return StepPlan(expired, [], [], [])
        encodes = [(s.slot.row, s.request.prompt) for s in admitted if s.slot is not None] if self._encoder else []
        return StepPlan(expired, self.cache.take_copies(), encodes, work)

    def done(self, plan: StepPlan) -> None:
        """The plan has run: its tokens are in the cache. Before anything is removed, for that moves rows as far as they
        are filled: rows of the same plan, too.
        """
        for work in plan.work:
            for sequence in work.sequences:
                assert sequence.slot is not None
                sequence.slot.filled += work.batch.input_ids.shape[1]

    def _expire(self, now: float) -> list[TokenSequence]:
        late = [
            sequence
            for sequence in (*self.waiting, *self.running.values())
            if sequence.request.deadline is not None and sequence.request.deadline <= now
        ]
        for sequence in late:
            self.remove(sequence)
        return late

    def _activate(self) -> None:
        """Prompts whose last chunk has run start to decode: their first token is there, not yet in the cache."""
        for sequence in self.running.values():
            slot = sequence.slot
            assert slot is not None
            if slot.state == "prefilling" and sequence.filled == sequence.length - 1 and sequence.generated:
                self.cache.activate(slot)
                self._regroup = True

    def _make_room(self) -> None:
        """Every decoding row gets a pool that holds its next token; rows change pools where that pays."""
        rows = [sequence for sequence in self.running.values() if sequence.slot and sequence.slot.state == "decoding"]
        slots = [sequence.slot for sequence in rows if sequence.slot is not None]
        outgrown = any(slot.filled + 1 > self.cache.capacities[slot.row.pool] for slot in slots)
        if not outgrown and not self._regroup:
            return
        needs = [max(slot.filled + 1, self._source_length(row)) for slot, row in zip(slots, rows, strict=True)]
        pools = regroup([slot.row.pool for slot in slots], needs, self.cache.capacities, self._call_cost)
        for slot, pool in zip(slots, pools, strict=True):
            self.cache.place(slot, pool)
        self._regroup = False

    def _admit(self) -> list[TokenSequence]:
        """Who got a row; where it lies may change until the plan is complete."""
        admitted = []
        while self.waiting and len(self.running) < self.cache.slots:
            sequence = self.waiting[0]  # in the queue until it has its row: nobody may be in neither
            first = min(sequence.length, self._chunk_tokens)
            slot = self.cache.open(
                sequence.request.id,
                sequence.buffer,
                sequence.length,
                need=max(first, self._source_length(sequence)),
                share=not self._encoder and not sequence.scored,
                salt=sequence.request.params.cache_salt,
            )
            sequence.begin(slot)
            self.running[sequence.request.id] = self.waiting.popleft()
            if not sequence.request.probe:
                self.reused_tokens += sequence.filled
            admitted.append(sequence)
        return admitted

    def _source_length(self, sequence: TokenSequence) -> int:
        """Of an encoder-decoder: the cross-attention cache lies in the same row and needs its own positions."""
        return len(sequence.request.prompt) if self._encoder else 1

    def _decodes(self) -> list[Work]:
        """One batch a pool; of a pipeline, as many as there are stages, so that all of them have work."""
        works = []
        for pool in range(len(self.cache.capacities)):
            slots = self.cache.decoding(pool)
            first = 0
            for part in _split(slots, self._stages):
                sequences = [self.running[slot.owner] for slot in part]
                ids = np.array([[sequence.buffer[sequence.length - 1]] for sequence in sequences], np.int64)
                works.append(Work(Batch(pool, first, ids, positions(part)), sequences, last=True))
                first += len(part)
        return works

    def _prefills(self, budget: int) -> list[Work]:
        """At least one chunk when any prompt is unfinished; at most `budget` tokens in all."""
        works: list[Work] = []
        left = [s for s in self.running.values() if s.slot and s.slot.state == "prefilling"]
        while left and budget > 0:
            # Dictionaries keep the order of arrival; `min` takes the first of equals.
            chosen = left[0] if self._oldest_first else min(left, key=lambda sequence: sequence.turns)
            self._oldest_first = not self._oldest_first
            left.remove(chosen)
            slot = chosen.slot
            assert slot is not None
            count = min(chosen.length - slot.filled, budget)
            if chosen.scored:
                count = min(count, self._scored_chunk)
            chosen.turns += 1
            budget -= count
            end = slot.filled + count
            if end > self.cache.capacities[slot.row.pool]:
                self.cache.place(slot, pool_for(end, self.cache.capacities))
            ids = chosen.buffer[None, slot.filled : end]
            every = chosen.scored and count > 1  # of one token it is the last
            batch = Batch(slot.row.pool, slot.row.place, ids, np.array([slot.filled], np.int64), every)
            works.append(Work(batch, [chosen], last=end == chosen.length))
        return works

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not add up, also those of the cache. For tests."""
        self.cache.check_integrity()
        assert all(sequence.slot is None for sequence in self.waiting), "who waits has a row"
        for number, sequence in self.running.items():
            slot = sequence.slot
            assert slot is not None, f"{number} runs without a row"
            assert slot.owner == number == sequence.request.id, f"the row of {number} is another's"
            assert slot.state != "kept", f"the row of {number} is free for others"
            assert slot.filled < sequence.length, f"{slot.filled} tokens of {number} are computed, of {sequence.length}"
        assert self.cache.running == len(self.running), "a row runs for nobody"


def _split(items: Sequence[Slot], parts: int) -> list[Sequence[Slot]]:
    size = -(-len(items) // parts)
    return [items[start : start + size] for start in range(0, len(items), size)] if items else []
