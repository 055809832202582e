"""The tokenizers of the versions that are served, as the models use them: loaded once, run off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.gateway.refused import Refused
from runtime.gateway.triton import Facts
from runtime.settings import GeneratorModelSettings, TokenizerModelSettings, TokenizerSettings
from runtime.tokenizer_file import open_tokenizer

_KEPT = 4  # versions
_AT_ONCE = 1  # a second text waits: tokenizers take all of a core


@dataclass(frozen=True)
class Token:
    """`start` and `stop` are characters of the text with its prompt; None for tokens that stand for none of it."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class ServedTokenizer:
    """Nothing is truncated and nothing padded. `labels`: what a classifier's outputs mean."""

    fast: Any
    max_length: int
    settings: TokenizerSettings | None = None
    labels: tuple[str, ...] = ()
    multi_label: bool = False

    @staticmethod
    def load(folder: Path, generates: bool) -> ServedTokenizer:
        """Raises BadEnvironment for a folder that is no version of ours."""
        file = folder / "tokenizer.json"
        if generates:
            longest = GeneratorModelSettings.load(folder).max_length
            return ServedTokenizer(open_tokenizer(file), longest)
        own = TokenizerModelSettings.load(folder)
        fast = open_tokenizer(file, own.tokenizer.lower_case)
        return ServedTokenizer(fast, own.tokenizer.max_length, own.tokenizer, own.labels, own.multi_label)

    def prompt(self, name: str | None) -> str:
        """What stands before each text. Raises Refused for a name that the model does not have."""
        known = {} if self.settings is None else self.settings.prompts
        chosen = name or (None if self.settings is None else self.settings.prompt_name)
        if chosen is None:
            return ""
        if chosen not in known:
            names = ", ".join(sorted(known)) or "no prompts"
            raise Refused(400, f"prompt_name is {chosen[:64]!r}; this model has {names}", param="prompt_name")
        return known[chosen]

    def tokens(self, texts: Sequence[str], special: bool) -> list[list[Token]]:
        # `encode` would keep Python's lock for as long as it runs.
        found = self.fast.encode_batch(list(texts), add_special_tokens=special)
        return [
            [
                Token(number, text, bool(mark), *((None, None) if mark else span))
                for number, text, mark, span in zip(
                    one.ids, one.tokens, one.special_tokens_mask, one.offsets, strict=True
                )
            ]
            for one in found
        ]

    def decode(self, rows: Sequence[Sequence[int]], skip_special: bool = True) -> list[str]:
        """Raises Refused for an id that the tokenizer does not have: it would leave it out."""
        for row in rows:
            unknown = next((one for one in set(row) if self.fast.id_to_token(one) is None), None)
            if unknown is not None:
                raise Refused(400, f"{unknown} is no token of this model")
        return [str(self.fast.decode(list(row), skip_special_tokens=skip_special)) for row in rows]


class ServedTokenizers:
    """`place`: the folder of the repository that holds a version, None where it is not known."""

    def __init__(self, place: Callable[[int], Path | None], model: str) -> None:
        self._place, self._model = place, model
        self._known: dict[int, ServedTokenizer] = {}
        self._gate = asyncio.Semaphore(_AT_ONCE)

    async def of(self, facts: Facts) -> ServedTokenizer:
        """Of the version that answers. Raises Refused where it is not known, BadEnvironment where it is damaged."""
        found = self._known.get(facts.version)
        if found is not None:
            return found
        repository = self._place(facts.version)
        if repository is None:
            raise Refused(501, "the tokenizer is not here: this gateway was started without --repository")
        name = self._model if facts.generates else f"{self._model}-tokenizer"
        folder = repository / name / str(facts.version)
        found = await asyncio.to_thread(ServedTokenizer.load, folder, facts.generates)
        self._known[facts.version] = found
        while len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]
        return found

    async def tokens(self, tokenizer: ServedTokenizer, texts: Sequence[str], special: bool) -> list[list[Token]]:
        async with self._gate:
            return await asyncio.to_thread(tokenizer.tokens, texts, special)
