"""From documents to tokens: a split, a tokenizer, and windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from builders.judging.corpus import Document

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
TokenIds = NDArray[np.int64]


def split(documents: Sequence[Document], held_out_share: float) -> tuple[list[Document], list[Document]]:
    """Documents to learn from, and documents to be judged by. A document's name decides, whatever else there is."""
    learnt: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        draw = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8]) / 2**64
        (held_out if draw < held_out_share else learnt).append(document)
    return learnt, held_out


def train_tokenizer(documents: Sequence[Document], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: no text is out of its reach, and decoding gives back every byte. Id 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for document in documents for text in document.passages), trainer)
    return tokenizer


def to_tokens(tokenizer: Tokenizer, documents: Sequence[Document], end: int = END_OF_TEXT_ID) -> TokenIds:
    """All passages in their order, each between ends of text, without what a tokenizer puts around a single text.
    [tokens]"""
    passages = [text for document in documents for text in document.passages]
    stream = [end]
    for encoded in tokenizer.encode_batch(passages, add_special_tokens=False):
        stream += [*encoded.ids, end]
    return np.array(stream, np.int64)


def windows(stream: TokenIds, window: int) -> TokenIds:
    """All of them, [rows, window + 1], in their order; what does not fill one is left out. Neighbours share one token,
    so that each but the first is a target once."""
    if len(stream) <= window:
        return np.zeros((0, window + 1), np.int64)
    return np.stack([stream[start : start + window + 1] for start in range(0, len(stream) - window, window)])


def batches(stream: TokenIds, window: int, rows: int, random: np.random.Generator) -> Iterator[TokenIds]:
    """Endless batches [rows, window + 1]: each epoch cuts the stream at another offset and shuffles the windows.

    Neighbouring windows share one token: the last target of one is the first input of the next.
    """
    while True:
        starts = np.arange(random.integers(window), len(stream) - window, window)
        random.shuffle(starts)
        for first in range(0, len(starts) - rows + 1, rows):
            yield np.stack([stream[start : start + window + 1] for start in starts[first : first + rows]])
