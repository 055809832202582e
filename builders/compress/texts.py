"""Calibration text: as many tokens as a step asks for, in batches of texts of like length."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from builders.artifacts import Checkpoint
from builders.errors import InputError
from builders.judging import corpus, retrieval, vectors
from builders.judging.perplexity import token_rows
from builders.spec import PrecisionSlice
from runtime.graph import Tensors

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, "torch.Tensor"]  # names of the graph's inputs; [texts, length]
TOKENS_PER_BATCH = 2048
ROW_TOKENS = 256  # of a language model's rows, at most
_CHARACTERS_PER_TOKEN = 6  # four and a half or so, and some more, since long texts are cut
WATCHED = 256  # texts that no fit sees, by which it is kept or undone


class CalibrationText:
    """Texts of the spec's file or of the standard library, without those that precision calibrates and is judged by."""

    def __init__(self, checkpoint: Checkpoint, budget: PrecisionSlice) -> None:
        self._checkpoint, self._file = checkpoint, budget.calibration_texts
        judged = budget.calibration_samples + vectors.HELD_OUT_TEXTS
        found = corpus.texts(self._file, judged + WATCHED)  # raises where there are fewer
        self._texts = corpus.texts(self._file, None)[len(found) :]
        self._watched = found[judged:]

    def watched(self) -> list[Batch]:
        return batches(self.watched_requests())

    def watched_requests(self) -> list[Tensors]:
        found = self._as_requests(self._watched)
        if not found:
            raise self._too_few(0, ROW_TOKENS, "a row of what is watched", "model.max_length")
        return found

    def _as_requests(self, texts: Sequence[str]) -> list[Tensors]:
        """A text each; of a language model, rows of one text after another."""
        if self._checkpoint.generation is None:
            return vectors.sample_requests(self._checkpoint, texts)
        try:
            rows = token_rows(self._checkpoint, texts, rows=sys.maxsize, length=ROW_TOKENS)
        except InputError:  # too little for one row
            return []
        return [{"input_ids": row[None], "attention_mask": np.ones_like(row[None])} for row in rows]

    def requests(self, tokens: int, least: int) -> list[Tensors]:
        """Up to `tokens` tokens to learn from: of the spec's file, or of the standard library and of the libraries that
        Trireme builds with. Raises InputError where there are fewer than `least`."""
        texts = list(self._texts)
        if self._file is None:
            known = {text for pair in retrieval.pairs() for text in pair}
            more = corpus.library_texts(tokens * _CHARACTERS_PER_TOKEN)
            texts = corpus.mixed({*texts, *(text for text in more if text not in known)})
        count, taken = 0, list[Tensors]()
        for start in range(0, len(texts), WATCHED):
            for request in self._as_requests(texts[start : start + WATCHED]):
                if count + request["input_ids"].size > tokens and count >= least:
                    return taken
                taken.append(request)
                count += request["input_ids"].size
        if count < least:
            raise self._too_few(count, least, "a batch, distil.batch_tokens", "distil.batch_tokens")
        return taken

    def batches(self, tokens: int, key: str) -> list[Batch]:
        """At least `tokens` tokens. Raises InputError where the texts hold fewer; `key` is the spec's."""
        count, taken = 0, list[Tensors]()
        for start in range(0, len(self._texts), WATCHED):
            for request in self._as_requests(self._texts[start : start + WATCHED]):
                taken.append(request)
                count += request["input_ids"].size
                if count >= tokens:
                    return batches(taken)
        raise self._too_few(count, tokens, key, key)

    def _too_few(self, count: int, least: int, why: str, key: str) -> InputError:
        return InputError(
            f"texts in {self._file or 'the standard library'}",
            got=f"{count} tokens beside the texts that precision calibrates and is judged by",
            expected=f"at least {least} ({why})", fix=f"give longer precision.calibration_texts, or lower {key}",
        )  # fmt: skip


def labelled(checkpoint: Checkpoint, file: Path) -> tuple[list[Batch], list[torch.Tensor]]:
    """Batches with the labels of their texts, from lines of a number, a tab and a text. Raises InputError."""
    return labelled_batches(*labelled_requests(checkpoint, file))


def labelled_requests(checkpoint: Checkpoint, file: Path) -> tuple[list[Tensors], list[int]]:
    """In the file's order. A reranker's lines hold two texts, and a single score tells 0 from 1. Raises InputError."""
    pairs = checkpoint.task == "reranking"
    labels, texts, seconds = zip(*corpus.labelled(file, max(2, checkpoint.labels), pairs=pairs), strict=True)
    return vectors.sample_requests(checkpoint, texts, seconds if pairs else None), list(labels)


def labelled_batches(
    requests: Sequence[Tensors], labels: Sequence[int], most: int = TOKENS_PER_BATCH
) -> tuple[list[Batch], list[torch.Tensor]]:
    import torch

    found = batches(requests, most)
    sizes = [len(batch["input_ids"]) for batch in found]
    return found, list(torch.split(torch.tensor(labels)[_order(requests)], sizes))


def batches(requests: Sequence[Tensors], most: int = TOKENS_PER_BATCH) -> list[Batch]:
    """Each text once, the shortest first, padded to the longest of its batch, in batches of `most` tokens."""
    import torch

    found: list[list[Tensors]] = []
    for index in _order(requests):
        request = requests[index]
        length = request["input_ids"].shape[1]
        if not found or (len(found[-1]) + 1) * length > most:
            found.append([])
        found[-1].append(request)
    made: list[Batch] = []
    for rows in found:
        length = rows[-1]["input_ids"].shape[1]
        padded = {
            name: np.concatenate([np.pad(row[name], ((0, 0), (0, length - row[name].shape[1]))) for row in rows])
            for name in rows[0]
        }
        made.append({name: torch.from_numpy(array) for name, array in padded.items()})
    return made


def _order(requests: Sequence[Tensors]) -> list[int]:
    return sorted(range(len(requests)), key=lambda index: requests[index]["input_ids"].shape[1])
