"""Which row of which pool holds whose keys and values. Bookkeeping only: executors own the memory.

    pool 0   capacity  128   [decoding | decoding | prefilling | kept | free | ...]
    pool 1   capacity  256   [decoding | kept | ...]
    ...                       `active` rows from 0 on are decoding: a step runs them as one contiguous batch

A row lives in a pool of its length's size, so that a step reads few empty positions (see `grouping`), and decoding rows
are compact, so that it computes no empty row: a hole is closed by copying the last row into it, which costs less than
one step with the hole. A sequence that outgrows its pool is copied to the next.

Finished sequences stay as they are, `kept`, until their row is needed (least recently used first). A new request
continues a kept row in place where that is a prefix of the prompt as a whole, and copies the longest shared prefix
from any row otherwise, running ones too. Copying a token costs microseconds, computing it most of a millisecond.

What is decided here happens later: `take_copies` are to be carried out in order, before the next run.

Whatever is bound to a row goes with its tenant: a move is always a copy, also of a row that holds no token yet, for its
source (of an encoder-decoder) may be there, and behind its tokens every row holds zeros. What else belongs to a
request (random numbers, penalties, text) is bound to its `Sequence` and never moves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.generation.grouping import pool_for
from runtime.generation.request import Tokens
from runtime.step import Copy, Row


@dataclass(eq=False)
class Slot:
    """A row and its tenant. The row holds keys and values of `tokens[:filled]`, and zeros behind them.

    Rows of different salts share nothing.

    Whoever computed tokens raises `filled`; `row` and `state` are the cache's alone, and any call to it may change the
    `row` of any slot: look it up when the plan is complete, do not keep it.
    """

    owner: int
    tokens: Tokens
    filled: int
    row: Row
    state: Literal["prefilling", "decoding", "kept"]
    used: int
    salt: str = ""


class SlotCache:
    """`slots` sequences at most run at once; each pool has `kept` more rows. Not thread-safe: the scheduler's alone.

    A slot is opened "prefilling", activated once, to "decoding", and closed once, to "kept" or to nothing.
    `open`, `activate`, `place` and `close` may move tenants, each by an entry in `take_copies`; none touches tokens.
    """

    def __init__(self, capacities: Sequence[int], slots: int, kept: int) -> None:
        if kept < 1 or slots < 1 or not capacities or list(capacities) != sorted(set(capacities)):
            raise ValueError(f"capacities {capacities} must rise, slots {slots} and kept {kept} be at least 1")
        self.capacities, self.slots = tuple(capacities), slots
        self.rows = slots + kept  # so that a spare row can always be found
        self._pools: list[list[Slot | None]] = [[None] * self.rows for _ in capacities]
        self._active = [0] * len(capacities)
        self._copies: list[Copy] = []
        self._clock = itertools.count()

    @property
    def running(self) -> int:
        return sum(slot.state != "kept" for slot in self._tenants())

    @property
    def running_tokens(self) -> int:
        return sum(slot.filled for slot in self._tenants() if slot.state != "kept")

    @property
    def kept(self) -> int:
        return sum(slot.state == "kept" for slot in self._tenants())

    def decoding(self, pool: int) -> list[Slot]:
        """Tenants of rows 0 … of the pool, in order."""
        return [slot for slot in self._pools[pool][: self._active[pool]] if slot is not None]

    def take_copies(self) -> list[Copy]:
        """Everything that has moved since the last time, in order; the caller carries it out before anything else is
        computed. A row that is encoded or computed in the same step is so where it lies after them.
        """
        copies, self._copies = self._copies, []
        return copies

    def open(self, owner: int, tokens: Tokens, length: int, *, need: int, share: bool = True, salt: str = "") -> Slot:
        """A row for `tokens[:length]`, holding `need` positions; what rows of its salt share of it is there.

        Call it only while `running < slots`. At least the last token is left to compute: its logits are wanted.
        Copies what is shared, or zeros where nothing is; moves and forgets kept rows, and no running one. Where rows
        have sources, `share` must be off: equal tokens after another source have other keys and values.
        """
        source, shared = self._longest_shared(tokens[: length - 1], salt) if share else (None, 0)
        pool = pool_for(max(need, shared), self.capacities)
        if source is not None and self._continues(source, shared, pool):
            row = source.row
            if shared < source.filled:
                self._copies.append(Copy(row, row, shared))  # what lay behind goes
        else:
            row = self._beside(pool)
            self._copies.append(Copy(None if source is None else source.row, row, shared))
            if source is not None:
                source.used = next(self._clock)
        slot = Slot(owner, tokens, shared, row, "prefilling", next(self._clock), salt)
        self._pools[row.pool][row.place] = slot
        return slot

    def activate(self, slot: Slot) -> None:
        """The prompt is computed: the row joins the decoding ones. Whoever lies in its new place moves aside, running
        or not.
        """
        pool, end = slot.row.pool, self._active[slot.row.pool]
        if slot.row.place != end:
            self._vacate(Row(pool, end))
            self._move(slot, Row(pool, end))
        self._active[pool] += 1
        slot.state = "decoding"

    def place(self, slot: Slot, pool: int) -> None:
        """Moves a running row to another pool, which must hold its tokens and its source. A hole among decoding rows is
        closed by the last of them.
        """
        if slot.row.pool == pool:
            return
        if slot.state == "prefilling":
            self._move(slot, self._beside(pool))
            return
        end, old = self._active[pool], slot.row
        self._vacate(Row(pool, end))
        self._move(slot, Row(pool, end))
        self._active[pool] += 1
        self._close_hole(old)

    def close(self, slot: Slot, *, keep: bool = True) -> None:
        """The sequence has ended; what it computed stays for others, if `keep`, as long as there is room. A hole among
        decoding rows is closed by the last of them. The slot is the caller's no more.
        """
        row, was = slot.row, slot.state
        slot.used, slot.state = next(self._clock), "kept"
        slot.filled *= keep
        slot.tokens = slot.tokens[: slot.filled]
        if not slot.filled:
            self._set(row, None)
        elif was == "decoding" and row.place != self._active[row.pool] - 1:
            self._vacate(row)
        if was == "decoding":
            self._close_hole(row)

    def clear(self) -> None:
        """Forgets everything, copies that were not taken too: the memory behind it is gone. No slot is valid after."""
        self._pools = [[None] * self.rows for _ in self.capacities]
        self._active = [0] * len(self.capacities)
        self._copies = []

    def _close_hole(self, row: Row) -> None:
        """The last decoding row moves to `row`, unless that was the last."""
        last = self._active[row.pool] - 1
        mover = self._pools[row.pool][last]
        self._active[row.pool] = last
        if last != row.place:
            assert mover is not None
            self._move(mover, row)

    def _continues(self, source: Slot, shared: int, pool: int) -> bool:
        """Whether a kept row is taken over as it is: nothing of it would be lost, or it would have to go anyway."""
        whole = shared == source.filled or None not in self._pools[pool][self._active[pool] :]
        return source.state == "kept" and source.row.pool == pool and whole

    def _longest_shared(self, tokens: Tokens, salt: str) -> tuple[Slot | None, int]:
        """The row that holds most of the beginning of `tokens`, and how much. A scan: a row costs a microsecond."""
        best: tuple[Slot | None, int] = (None, 0)
        for slot in self._tenants():
            length = min(slot.filled, len(tokens))
            if length <= best[1] or slot.salt != salt or slot.tokens[0] != tokens[0]:
                continue
            differs = slot.tokens[:length] != tokens[:length]
            shared = int(differs.argmax()) if differs.any() else length
            if shared > best[1]:
                best = (slot, shared)
        return best

    def _beside(self, pool: int) -> Row:
        """The first row behind the decoding ones that no other prompt has, made free: from there, a row that is ready
        to decode seldom has to move.
        """
        rows = self._pools[pool]
        behind = range(self._active[pool], self.rows)
        row = Row(pool, next(at for at in behind if (tenant := rows[at]) is None or tenant.state == "kept"))
        self._vacate(row)
        return row

    def _vacate(self, row: Row) -> None:
        """Moves the tenant of a row that is wanted to a free one, or to that of the least recently used kept one."""
        rows = self._pools[row.pool]
        tenant = rows[row.place]
        if tenant is None:
            return
        behind = range(self._active[row.pool], self.rows)
        free = next((place for place in behind if rows[place] is None), None)
        if free is None:
            kept = [slot for slot in rows if slot is not None and slot.state == "kept"]
            free = min(kept, key=lambda slot: slot.used).row.place
            rows[free] = None
        if free != row.place:
            self._move(tenant, Row(row.pool, free))

    def _move(self, slot: Slot, row: Row) -> None:
        """To a row without a tenant, with all that is bound to it, and zeros behind."""
        self._copies.append(Copy(slot.row, row, slot.filled))
        self._set(slot.row, None)
        self._set(row, slot)
        slot.row = row

    def _set(self, row: Row, slot: Slot | None) -> None:
        self._pools[row.pool][row.place] = slot

    def _tenants(self) -> Iterator[Slot]:
        return (slot for rows in self._pools for slot in rows if slot is not None)

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not add up. For tests, and cheap enough for an idle moment."""
        for pool, rows in enumerate(self._pools):
            for index, slot in enumerate(rows):
                inside = index < self._active[pool]
                assert not inside or slot is not None, f"pool {pool}: hole at {index}"
                if slot is None:
                    continue
                assert slot.row == Row(pool, index), f"{slot.row} is at {pool}, {index}"
                assert inside == (slot.state == "decoding"), f"{slot.state} at {index} of {self._active[pool]} active"
                assert slot.filled <= min(len(slot.tokens), self.capacities[pool]), "more tokens than the row holds"
                assert slot.state != "kept" or slot.filled > 0, "an empty row is kept"
        owners = [slot.owner for slot in self._tenants() if slot.state != "kept"]
        assert len(owners) == len(set(owners)) <= self.slots, "a sequence with two rows, or too many sequences"


def capacity_ladder(longest: int, first: int = 128) -> tuple[int, ...]:
    """Capacities up to `longest`: powers of two and the steps half-way between, so at most a third is empty.

    >>> capacity_ladder(1024)
    (128, 192, 256, 384, 512, 768, 1024)
    """
    steps = sorted({size for power in range(32) for size in (first << power, 3 * (first << power) // 2)})
    return (*(size for size in steps if size < longest), longest)


def positions(slots: Sequence[Slot]) -> Tokens:
    """Where each row's next token is written, [rows]."""
    return np.fromiter((slot.filled for slot in slots), np.int64, len(slots))
