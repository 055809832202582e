"""What a caller asks for, checked, and what comes back. Nothing here knows how tokens are made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadRequest, ServingError

FinishReason = Literal["stop", "length", "cancelled", "error"]
Tokens = NDArray[np.int64]

MAX_TOP_LOGPROBS = 20
_MAX_STOP_STRINGS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_BIASES = 1024
Top = tuple[tuple[int, float], ...]  # tokens and their log-probabilities, the likeliest first


class ScoredToken(NamedTuple):
    """A token of the prompt, with its log-probability after what stands before it; the first follows nothing."""

    token: int
    logprob: float | None
    top: Top


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when to end. Raises BadRequest for values that mean nothing.

    temperature         0 is greedy
    top_k, top_p, min_p   0, 1 and 0 turn each off; applied in this order, top_p to what top_k has left
    repetition_penalty  divides positive and multiplies negative logits of tokens in prompt or output (CTRL, 2019)
    presence_penalty, frequency_penalty   subtracted once, or once an occurrence, for tokens in the output (OpenAI's)
    seed                the same seed, prompt and parameters give the same tokens, whatever else is running
    min_tokens          no end token and no stop string counts before this many
    stop                strings that end the output and are not part of it
    stop_token_ids      beside the model's own end tokens; not part of the output either
    forced              the output begins with these tokens, whatever the model would choose; no end counts before them
    logit_bias          tokens and what is added to their logits, before any penalty (OpenAI's)
    logprobs            natural logarithm of each token's probability under the unmodified model: of its logits as they
                        are, before biases, penalties, temperature, filters and grammars
    top_logprobs        the same of so many of the likeliest tokens beside it
    prompt_logprobs     both for the prompt's tokens too
    cache_salt          whose the prompt is: keys and values are shared among prompts of one salt alone, so that nobody
                        learns from the time of an answer what another has asked
    """

    max_tokens: int | None = None  # none: the model's default or `min_tokens`, or what fits
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    cache_salt: str = ""

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1  # a prompt may be scored and not continued
        _require(self.max_tokens is None or self.max_tokens >= least, "max_tokens", self.max_tokens, f"{least} or more")
        _require(self.min_tokens >= 0, "min_length", self.min_tokens, "0 or more")
        if self.max_tokens is not None:
            _require(self.min_tokens <= self.max_tokens, "min_length", self.min_tokens, "at most max_tokens")
            forced = len(self.forced)
            _require(forced <= self.max_tokens, "forced_ids", f"{forced} tokens", "at most max_tokens")
        _require(_within(self.temperature, 0.0, 100.0), "temperature", self.temperature, "a number from 0 to 100")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(_within(self.top_p, 0.0, 1.0) and self.top_p > 0, "top_p", self.top_p, "above 0, at most 1")
        _require(_within(self.min_p, 0.0, 1.0), "min_p", self.min_p, "a number from 0 to 1")
        repetition = self.repetition_penalty
        _require(_within(repetition, 0.01, 100.0), "repetition_penalty", repetition, "a number from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(_within(getattr(self, name), -100.0, 100.0), name, getattr(self, name), "from -100 to 100")
        _require(self.seed is None or 0 <= self.seed < 1 << 64, "random_seed", self.seed, "0 to 2^64 - 1")
        _require(len(self.stop) <= _MAX_STOP_STRINGS, "stop_words", len(self.stop), f"at most {_MAX_STOP_STRINGS}")
        for text in self.stop:
            _require(0 < len(text) <= _MAX_STOP_CHARACTERS, "stop_words", repr(text[:20]), "1 to 256 characters each")
        self._require_scores()

    def _require_scores(self) -> None:
        """Biases and log-probabilities."""
        _require(len(self.logit_bias) <= _MAX_BIASES, "logit_bias_ids", len(self.logit_bias), f"at most {_MAX_BIASES}")
        for _, bias in self.logit_bias:
            _require(_within(bias, -100.0, 100.0), "logit_bias_values", bias, "from -100 to 100")
        ids = {token for token, _ in self.logit_bias}
        _require(len(ids) == len(self.logit_bias), "logit_bias_ids", "a token twice", "each token once")
        top = self.top_logprobs
        _require(0 <= top <= MAX_TOP_LOGPROBS, "top_log_probs", top, f"0 to {MAX_TOP_LOGPROBS}")
        asked = self.logprobs or self.prompt_logprobs
        _require(not top or asked, "top_log_probs", top, "return_log_probs or return_prompt_log_probs beside it")

    @cached_property
    def plain(self) -> bool:
        """The token with the largest logit, and nothing else asked."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        changed = penalties or bool(self.logit_bias)
        return self.temperature == 0.0 and not changed and not self.logprobs and not self.forced


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt. `deadline` is a moment of the engine's clock, in seconds; after it the request is of no use."""

    id: int
    prompt: Tokens
    params: SamplingParams = field(default_factory=SamplingParams)
    deadline: float | None = None
    probe: bool = False  # nobody's traffic: it is not counted, and its cache is not kept for others


class Update(NamedTuple):
    """What one step brought for one request. `finish` is set in the last one, `error` where it failed. A tuple, for one
    is made for every token.

    tops     beside each of `logprobs`, where they were asked for
    prompt   of the prompt's tokens, as they are read
    cached   tokens of the prompt that were found in the cache; with `finish`
    """

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[float, ...] = ()
    finish: FinishReason | None = None
    error: ServingError | None = None
    tops: tuple[Top, ...] = ()
    prompt: tuple[ScoredToken, ...] = ()
    cached: int = 0


def coalesce(updates: Iterable[Update]) -> dict[int, Update]:
    """One update a request, in order of first appearance: what came for it, joined."""
    joined: dict[int, Update] = {}
    for update in updates:
        before = joined.get(update.request)
        joined[update.request] = update if before is None else join(before, update)
    return joined


def join(before: Update, update: Update) -> Update:
    return Update(
        request=update.request,
        tokens=before.tokens + update.tokens,
        text=before.text + update.text,
        logprobs=before.logprobs + update.logprobs,
        finish=update.finish,
        error=update.error,
        tops=before.tops + update.tops,
        prompt=before.prompt + update.prompt,
        cached=update.cached,
    )


@dataclass(frozen=True)
class Limits:
    """What the model can take. `max_length` counts prompt and output together; of an encoder-decoder, each alone."""

    vocabulary: int
    max_length: int
    default_max_tokens: int
    end_ids: tuple[int, ...] = ()
    decoder_start_id: int | None = None  # set for encoder-decoders: the prompt goes to the encoder

    @property
    def possible_end_ids(self) -> tuple[int, ...]:
        """Checkpoints name ids that their models cannot make, -1 for one: these never end anything, and no logit is
        theirs.
        """
        return tuple(token for token in self.end_ids if 0 <= token < self.vocabulary)

    def room(self, request: Request) -> int:
        """How many tokens the output may have. Raises BadRequest where the request does not fit the model."""
        prompt, asked = request.prompt, request.params.max_tokens
        if prompt.ndim != 1 or not len(prompt):
            raise BadRequest("the prompt has no tokens; send at least one")
        if prompt.min() < 0 or prompt.max() >= self.vocabulary:
            wrong = int(prompt[(prompt < 0) | (prompt >= self.vocabulary)][0])
            raise BadRequest(f"input_ids holds {wrong}; token ids of this model are 0 to {self.vocabulary - 1}")
        self._require_tokens(request.params)
        # The last token of the output is never read again, so it needs no place in the cache.
        free = self.max_length + 1 - (len(prompt) if self.decoder_start_id is None else 1)
        if len(prompt) > self.max_length:
            raise BadRequest(f"the prompt has {len(prompt)} tokens; this model takes at most {self.max_length}")
        if max(asked or 0, request.params.min_tokens) > free:
            raise BadRequest(
                f"max_tokens={asked} and min_length={request.params.min_tokens} after a prompt of {len(prompt)}; "
                f"this model has room for {free} more tokens"
            )
        return min(max(self.default_max_tokens, request.params.min_tokens), free) if asked is None else asked

    def _require_tokens(self, params: SamplingParams) -> None:
        """Raises BadRequest for tokens that the model does not have, and for a prompt that an encoder reads and that
        is to be scored all the same."""
        biased = tuple(token for token, _ in params.logit_bias)
        named = {"stop_token_ids": params.stop_token_ids, "forced_ids": params.forced, "logit_bias_ids": biased}
        for name, tokens in named.items():
            for token in tokens:
                if not 0 <= token < self.vocabulary:
                    raise BadRequest(f"{name} holds {token}; token ids are 0 to {self.vocabulary - 1}")
        if params.prompt_logprobs and self.decoder_start_id is not None:
            raise BadRequest("return_prompt_log_probs: an encoder reads this model's prompts; their tokens have none")


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


def _require(sound: bool, name: str, got: object, expected: str) -> None:
    if not sound:
        raise BadRequest(f"{name} is {got}; expected {expected}")
