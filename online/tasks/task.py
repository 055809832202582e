"""The seam of online learning. Whatever the task, a row is a row of whole numbers, [width]: memory, batches and journal
know no more of it; what it means, how it is learnt and how it is judged is the task's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from builders.judging.corpus import Document

if TYPE_CHECKING:
    import torch

Rows = NDArray[np.int64]  # [rows, width]
Figures = NDArray[np.float64]  # one for each row


@dataclass(frozen=True)
class Scores:
    """Of a model on rows. `losses` in nats: the exponential of their mean is a perplexity, be it of the next token, of
    the right text or of the right label. `shares` lie between 0 and 1, 1 is right; `guarded` names those that an update
    may not lower by more than its budget. `vectors` are a model's own of its texts, [rows, width]: how far they have
    moved is a share too, which takes two models to tell."""

    losses: Figures
    shares: Mapping[str, Figures] = field(default_factory=dict)
    guarded: tuple[str, ...] = ()
    vectors: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Training:
    """What the learner asks of a task for one update. `previous` stays as it is; the last `replayed` rows of each batch
    are of the past, on which `pull` weighs the distance to it."""

    model: Any
    previous: Any
    replayed: int
    pull: float
    temperature: float


class LearningTask(Protocol):
    """Opened for one checkpoint: its versions differ in weights alone, so it serves them all."""

    @property
    def width(self) -> int:
        """Of a row."""

    @property
    def together(self) -> int:
        """Rows of the smallest batch that has a loss."""

    @property
    def predictions(self) -> int:
        """Of a row, over which a loss is the mean."""

    def window_of(self, width: int) -> int:
        """The window that makes rows of this width."""

    def read(self, sample: Mapping[str, Any], min_rating: float) -> Document | str:
        """What feedback teaches, or why it teaches nothing. The document's name decides whether it is held out."""

    def past(self, file: Path | None) -> tuple[Sequence[Document], str]:
        """What the first version can do, of a file or of what lies at hand, and what that is. Raises InputError."""

    def rows(self, documents: Sequence[Document]) -> Rows: ...

    def fault(self, rows: Rows) -> str | None:
        """What makes them no rows of this task, in words."""

    def load(self, folder: Path) -> Any:
        """A version's model, in fp32, whose parameters an update moves. Raises InputError for a folder without one."""

    def scores(self, model: Any, rows: Rows) -> Scores:
        """The same for the same rows in the same order."""

    def surprise(self, model: Any, known: Rows, fresh: Rows) -> tuple[Figures, Figures]:
        """How unusual each row is to the model; the higher, the more. Of rows that it knows, and of those that came."""

    def loss(self, training: Training) -> Callable[[Rows], torch.Tensor]:
        """Of a batch. Sets the model's mode."""

    def tokens(self, batch: Rows) -> int: ...
