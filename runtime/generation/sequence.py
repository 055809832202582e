"""One request under way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from runtime.generation.cache import Slot
from runtime.generation.detokenizer import Decoder, Detokenizer
from runtime.generation.guides import Guide
from runtime.generation.request import FinishReason, Limits, Request, ScoredToken, Tokens, Top, Update


@dataclass(eq=False)
class TokenSequence:
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
    # Tokens, their log-probabilities and the likeliest ones; their text is held.
    unsent: list[tuple[int, float, Top]] = field(default_factory=list)
    guide: Guide | None = None
    cached: int = 0  # tokens of the prompt that were in the cache

    @classmethod
    def start(
        cls, request: Request, limits: Limits, decoder: Decoder | None, now: float, guide: Guide | None = None
    ) -> TokenSequence:
        """`decoder` turns tokens into text, if text is wanted. Raises BadRequest for what does not fit the model."""
        room = limits.room(request)
        if guide is not None:
            guide.require_alone(request.params, limits.possible_end_ids)
        start = limits.decoder_start_id
        continued = request.prompt.tolist() if start is None else ()
        shown = {} if guide is None else guide.shown
        detokenizer = None if decoder is None else Detokenizer(decoder, request.params.stop, continued, shown)
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
            guide=guide,
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
        return self.generated < self.least

    @property
    def least(self) -> int:
        """Tokens of output before which no end counts."""
        return max(self.request.params.min_tokens, len(self.request.params.forced))

    @property
    def forced(self) -> int | None:
        """The next token where the caller has fixed it."""
        tokens = self.request.params.forced
        return tokens[self.generated] if self.generated < len(tokens) else None

    @property
    def plain(self) -> bool:
        return self.request.params.plain and not self.held and self.guide is None

    @property
    def scored(self) -> bool:
        """Whether the prompt's own tokens are to be scored: all of it is computed, in the cache or not."""
        return self.request.params.prompt_logprobs

    def begin(self, slot: Slot) -> None:
        """It has a row."""
        self.slot, self.cached = slot, slot.filled

    def told(self, scored: tuple[ScoredToken, ...], *, ended: bool) -> Update:
        """Log-probabilities of tokens of the prompt; `ended`: nothing more is wanted."""
        return Update(
            self.request.id, prompt=scored, finish="length" if ended else None, cached=self.cached if ended else 0
        )

    def append(self, token: int, logprob: float, top: Top = ()) -> Update:
        """What the token brings: text, the tokens whose text is out or has none, and why the output ends if it does.

        Tokens of a stop string, and end tokens, are not part of the output.
        """
        held = self.held
        if token in self.end_ids and not held:
            return self._update(self._flush(), "stop")
        self.buffer[self.length] = token
        self.length += 1
        self.unsent.append((token, logprob, top))
        text, stopped = "", False
        if self.detokenizer is not None:
            text, stopped = self.detokenizer.push(token, may_stop=self.generated >= self.least)
        if stopped:
            return self._update(text, "stop")
        if self.guide is not None and self.guide.complete_with(token):
            return self._update(text + self._flush(), "stop")
        if self.generated == self.room:
            return self._update(text + self._flush(), "length")
        return self._update(text, None)

    def _update(self, text: str, finish: FinishReason | None) -> Update:
        held = 0 if self.detokenizer is None else self.detokenizer.held_tokens
        out = self.unsent[: len(self.unsent) - held]
        del self.unsent[: len(out)]
        params = self.request.params
        return Update(
            request=self.request.id,
            tokens=tuple([token for token, _, _ in out]),
            text=text,
            logprobs=tuple([logprob for _, logprob, _ in out]) if params.logprobs else (),
            finish=finish,
            tops=tuple([top for _, _, top in out]) if params.logprobs and params.top_logprobs else (),
            cached=self.cached if finish is not None else 0,
        )

    def _flush(self) -> str:
        return "" if self.detokenizer is None else self.detokenizer.flush()
