"""Embeddings: pairs of texts that belong together, told apart from the texts of other pairs.

van den Oord et al., 2018, "Representation learning with contrastive predictive coding" (InfoNCE); Henderson et al.,
2017, "Efficient natural language response suggestion" (the other answers of a batch as what is wrong).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builders.judging import corpus, retrieval
from builders.judging.corpus import Document
from online.tasks.encoder import NOTHING, EncoderTexts, tokens_of
from online.tasks.reading import unread_kind
from online.tasks.task import Figures, Rows, Scores, Training
from runtime.errors import InputError

if TYPE_CHECKING:
    import torch

TEMPERATURE = 0.05  # that hold-outs are judged at, whatever an update is trained at: so figures stay comparable
FOUND = "found first"
_TOGETHER = 16  # pairs of which a loss is made where no batch is trained


@dataclass(frozen=True)
class EmbeddingTask:
    """A row is a query, the text that belongs to it and one that does not, `window` tokens each; the last may be
    nothing."""

    texts: EncoderTexts

    @property
    def width(self) -> int:
        return 3 * self.texts.window

    @property
    def together(self) -> int:
        """A text is the right one among others."""
        return _TOGETHER

    @property
    def predictions(self) -> int:
        return 1

    def window_of(self, width: int) -> int:
        return width // 3

    def read(self, sample: Mapping[str, Any], min_rating: float) -> Document | str:
        if (why := unread_kind("embedding", sample["kind"])) is not None:
            return why
        return pair_document(sample["query"], sample["positive"], sample.get("negative") or "")

    def past(self, file: Path | None) -> tuple[Sequence[Document], str]:
        """Lines of a query, a tab and its text (a tab and one that is wrong); else docstrings of Python's own, whose
        first lines look for the rest."""
        if file is None:
            found = [pair_document(line, body, "") for line, body in retrieval.pairs()]
            return [one for one in found if isinstance(one, Document)], "pairs of Python's own docstrings"
        documents = []
        for number, line in enumerate(corpus.texts(file, None), 1):
            parts = line.split("\t")
            made = pair_document(*(*parts, "")[:3]) if len(parts) in (2, 3) else f"{len(parts)} columns"
            if isinstance(made, str):
                raise InputError(
                    f"online.old_texts {file}, different line {number}", got=made,
                    expected="a query, a tab and the text that belongs to it (a tab and one that does not)",
                    fix="mend the line",
                )  # fmt: skip
            documents.append(made)
        return documents, f"old pairs in {file}"

    def rows(self, documents: Sequence[Document]) -> Rows:
        columns = zip(*(document.passages for document in documents), strict=True) if documents else ((), (), ())
        query, positive, negative = (list(column) for column in columns)
        given = np.array([bool(text) for text in negative], bool)
        packed = [self.texts.pack(query), self.texts.pack(positive), self.texts.pack(negative)]
        packed[2][~given] = NOTHING
        return np.concatenate(packed, axis=1)

    def fault(self, rows: Rows) -> str | None:
        query, positive, _ = _parts(rows)
        if (query[:, 0] == NOTHING).any() or (positive[:, 0] == NOTHING).any():
            return "a row without a query, or without the text that belongs to it"
        return self.texts.fault(rows)

    def load(self, folder: Path) -> Any:
        return self.texts.load(folder)

    def scores(self, model: Any, rows: Rows) -> Scores:
        """Each query among the texts of all rows. Of equals, the right one comes last."""
        import torch

        query, candidates = self._vectors(lambda ids: self.texts.outputs(model, ids), rows)
        similarity = query @ candidates.T  # [rows, candidates]
        own = similarity.diagonal().clone()
        similarity[torch.from_numpy(right_too(rows))] = -torch.inf
        losses = torch.nn.functional.cross_entropy(similarity / TEMPERATURE, torch.arange(len(rows)), reduction="none")
        others = similarity.fill_diagonal_(-torch.inf).amax(1)
        vectors = torch.cat([query, candidates[: len(rows)]], 1).numpy()
        return Scores(losses.double().numpy(), {FOUND: (own > others).double().numpy()}, vectors=vectors)

    def surprise(self, model: Any, known: Rows, fresh: Rows) -> tuple[Figures, Figures]:
        """How far a query lies from the mean of those that are known: the mean of it is the distance of the means."""
        import torch

        def queries(rows: Rows) -> torch.Tensor:
            return _unit(self.texts.outputs(model, _parts(rows)[0]))

        usual = queries(known)
        middle = torch.nn.functional.normalize(usual.mean(0), dim=0)
        first, second = (1 - vectors @ middle for vectors in (usual, queries(fresh)))
        return first.double().numpy(), second.double().numpy()

    def loss(self, training: Training) -> Callable[[Rows], torch.Tensor]:
        """Cross-entropy of the right text among all of the batch, and the pull: one minus the cosine between the
        vectors of this and the previous version, of the replayed queries and their texts."""
        import torch

        forward = self.texts.trained_forward(training.model)
        before = self.texts.forward(training.previous)
        old = training.replayed

        def loss(batch: Rows) -> torch.Tensor:
            query, candidates = self._vectors(forward, batch)
            similarity = query @ candidates.T / training.temperature
            similarity = similarity.masked_fill(torch.from_numpy(right_too(batch)), -torch.inf)
            total = torch.nn.functional.cross_entropy(similarity, torch.arange(len(batch)))
            if training.pull and old:
                with torch.no_grad():
                    known = torch.cat([_unit(before(ids)) for ids in _parts(batch[-old:])[:2]])
                here = torch.cat([query[-old:], candidates[len(batch) - old : len(batch)]])
                total = total + training.pull * (1 - (here * known).sum(1)).mean()
            return total

        return loss

    def tokens(self, batch: Rows) -> int:
        return tokens_of(batch)

    def _vectors(self, forward: Callable[[Rows], torch.Tensor], rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries, and of candidates: the right texts in the order of the rows, then the wrong ones."""
        import torch

        query, positive, negative = _parts(rows)
        given = negative[:, 0] != NOTHING
        candidates = [_unit(forward(positive))]
        if given.any():
            candidates.append(_unit(forward(negative[given])))
        return _unit(forward(query)), torch.cat(candidates)


def pair_document(query: str, positive: str, negative: str) -> Document | str:
    """Its name is of the query, so that one that is asked twice is not held out and learnt at once; and not the query
    itself, as pairs may have been chosen by its digest. Or why it is none."""
    if not query.strip() or not positive.strip():
        return "a pair of which one text is blank"
    if positive == negative:
        return "a pair whose negative is its positive"
    return Document(f"query {query}", (query, positive, negative if negative.strip() else ""))


def right_too(rows: Rows) -> NDArray[np.bool_]:
    """[rows, candidates]: texts that stand for another row, and are no wrong answer to this one: its own text, the text
    of the same query, or one that was said to be wrong of another row."""
    query, positive, negative = _parts(rows)
    given = negative[:, 0] != NOTHING
    count = len(rows)
    _, asked = np.unique(query, axis=0, return_inverse=True)
    _, known = np.unique(np.concatenate([positive, negative[given]]), axis=0, return_inverse=True)
    asked, known = asked.reshape(-1), known.reshape(-1)  # numpy 2.0 keeps an axis
    good = np.zeros((int(asked.max()) + 1, int(known.max()) + 1), bool)  # of a query, by text
    good[asked, known[:count]] = True
    found: NDArray[np.bool_] = good[asked][:, known]
    found[np.arange(count), np.arange(count)] = False
    return found


def _parts(rows: Rows) -> tuple[Rows, Rows, Rows]:
    first, second, third = np.split(rows, 3, axis=1)
    return first, second, third


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.normalize(vectors.float(), dim=1)
