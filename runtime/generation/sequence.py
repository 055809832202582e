"""One request under way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime.generation.cache import Slot
from runtime.generation.detokenizer import Detokenizer
from runtime.generation.request import FinishReason, Limits, Request, Tokens


@dataclass(eq=False)
class Sequence:
    """`buffer[:length]` are prompt and output. The cache holds the first `slot.filled` of them."""

    request: Request
    buffer: Tokens
    length: int
    prompt_length: int
    room: int  # most tokens of output
    end_ids: frozenset[int]
    arrived: float
    random: np.random.Generator
    detokenizer: Detokenizer | None = None
    slot: Slot | None = None
    last_token_at: float | None = None
    turns: int = 0  # chunks of its prompt that have run

    @classmethod
    def start(cls, request: Request, limits: Limits, detokenizer: Detokenizer | None, now: float) -> Sequence:
        """Raises BadRequest for a request that does not fit the model."""
        room = limits.room(request)
        start = limits.decoder_start_id
        prompt = request.prompt if start is None else np.array([start], np.int64)
        buffer = np.zeros(len(prompt) + room, np.int64)
        buffer[: len(prompt)] = prompt
        return cls(
            request=request,
            buffer=buffer,
            length=len(prompt),
            prompt_length=len(prompt),
            room=room,
            end_ids=frozenset((*limits.possible_end_ids, *request.params.stop_token_ids)),
            arrived=now,
            random=np.random.Generator(np.random.Philox(request.params.seed)),
            detokenizer=detokenizer,
        )

    @property
    def filled(self) -> int:
        return 0 if self.slot is None else self.slot.filled

    @property
    def generated(self) -> int:
        return self.length - self.prompt_length

    @property
    def held(self) -> bool:
        """Whether the output is still too short to end."""
        return self.generated < self.request.params.min_tokens

    @property
    def plain(self) -> bool:
        return self.request.params.plain and not self.held

    def append(self, token: int) -> tuple[str, FinishReason | None, bool]:
        """New text, why the output ends here if it does, and whether the token is part of the output."""
        held = self.held
        if token in self.end_ids and not held:
            return self._flush(), "stop", False
        self.buffer[self.length] = token
        self.length += 1
        text, stopped = "", False
        if self.detokenizer is not None:
            text, stopped = self.detokenizer.push(token, may_stop=self.generated >= self.request.params.min_tokens)
        if stopped:
            return text, "stop", True
        if self.generated == self.room:
            return text + self._flush(), "length", True
        return text, None, True

    def _flush(self) -> str:
        return "" if self.detokenizer is None else self.detokenizer.flush()
