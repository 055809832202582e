"""What the model is worth: perplexity on held-out documents, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.judging.corpus import Document
from builders.training import text
from builders.training.recipe import HeldOut, Sample
from builders.training.text import END_OF_TEXT_ID, TokenIds, to_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPTS = ("Return True if", "This module provides", "Raised when", "The following example")
_ROWS = 8


def judge(model: Any, tokenizer: Tokenizer, documents: Sequence[Document], context: int) -> HeldOut:
    """Every token of the documents once, given those before it in its window of `context` tokens.

    Ends of text count as tokens and have no bytes.
    """
    stream = to_tokens(tokenizer, documents)
    nats = sum(nats_of(model, window) for window in windows(stream, context))
    size = sum(len(text.encode()) for document in documents for text in document.passages)
    return HeldOut(
        documents=len(documents),
        tokens=len(stream) - 1,
        bytes=size,
        nats=nats,
        perplexity_per_token=math.exp(nats / (len(stream) - 1)),
        perplexity_per_byte=math.exp(nats / size),
    )


def windows(stream: TokenIds, context: int) -> list[TokenIds]:
    """Whole ones in batches, and the rest of the stream as a batch of one shorter row."""
    whole = text.windows(stream, context)
    rest = stream[None, len(whole) * context :]
    parts = [whole[first : first + _ROWS] for first in range(0, len(whole), _ROWS)]
    return [*parts, rest] if rest.shape[1] > 1 else parts


def nats_of(model: Any, tokens: TokenIds) -> float:
    """The sum of cross-entropies, in nats, of a batch [rows, length + 1]."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(tokens))
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
    return float(total)


def samples(model: Any, tokenizer: Tokenizer, seed: int, new_tokens: int = 64) -> tuple[Sample, ...]:
    """Sampled at temperature 0.7 among the 40 likeliest tokens, until the end of the text or `new_tokens`."""
    import torch

    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.7,
            top_k=40,
            max_new_tokens=new_tokens,
            pad_token_id=END_OF_TEXT_ID,
        )
        found.append(Sample(prompt=prompt, completion=tokenizer.decode(output[0, ids.shape[1] :].tolist())))
    return tuple(found)
