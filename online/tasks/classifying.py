"""A classifier: texts, each with the label that it should have had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.artifacts import Checkpoint
from builders.checkpoint.labels import label_names
from builders.judging import corpus
from builders.judging.corpus import Document
from online.tasks.encoder import NOTHING, EncoderTexts, tokens_of
from online.tasks.reading import unread_kind
from online.tasks.task import Figures, Rows, Scores, Training
from runtime.errors import InputError

if TYPE_CHECKING:
    import torch

ACCURACY = "accuracy"
_SHOWN = 5


@dataclass(frozen=True)
class ClassifierTask:
    """A row is the number of a label, and `window` tokens of text."""

    texts: EncoderTexts
    names: tuple[str, ...]

    @staticmethod
    def of(texts: EncoderTexts, checkpoint: Checkpoint) -> ClassifierTask:
        """Raises InputError for a classifier whose labels do not exclude each other."""
        names, several = label_names(checkpoint)
        if several or len(names) < 2 or len(set(names)) < len(names):
            raise InputError(
                f"labels of {checkpoint.source}",
                got="several labels a text (multi_label_classification)" if several else f"{', '.join(names)}",
                expected="two labels or more, of different names, of which a text has one",
                fix="such a classifier learns online; others are trained elsewhere",
            )  # fmt: skip
        return ClassifierTask(texts, names)

    @property
    def width(self) -> int:
        return 1 + self.texts.window

    @property
    def together(self) -> int:
        return 1

    @property
    def predictions(self) -> int:
        return 1

    def window_of(self, width: int) -> int:
        return width - 1

    def read(self, sample: Mapping[str, Any], min_rating: float) -> Document | str:
        if (why := unread_kind("classification", sample["kind"])) is not None:
            return why
        prompt = sample.get("prompt") or ""
        if not prompt.strip():
            return "a label of a text that nobody kept"
        if sample["label"] not in self.names:
            known = ", ".join(self.names[:_SHOWN]) + (", ..." if len(self.names) > _SHOWN else "")
            return f"a label that the model does not have (it has {known})"
        return _labelled(self.names.index(sample["label"]), prompt)

    def past(self, file: Path | None) -> tuple[Sequence[Document], str]:
        if file is None:
            raise InputError(
                "online.old_texts", got="nothing",
                expected="a file of labelled texts: what the classifier can do, by which is judged what it forgets",
                fix="give lines of a label's number, a tab and a text",
            )  # fmt: skip
        found = corpus.labelled(file, len(self.names))
        return [_labelled(label, text) for label, text, _ in found], f"old texts in {file}"

    def rows(self, documents: Sequence[Document]) -> Rows:
        labels = np.array([int(document.passages[0]) for document in documents], np.int64)
        return np.column_stack([labels, self.texts.pack([document.passages[1] for document in documents])])

    def fault(self, rows: Rows) -> str | None:
        if rows[:, 0].min() < 0 or rows[:, 0].max() >= len(self.names):
            return f"labels from {rows[:, 0].min()} to {rows[:, 0].max()}, not all of them below {len(self.names)}"
        if (rows[:, 1] == NOTHING).any():
            return "a row without a text"
        return self.texts.fault(rows[:, 1:])

    def load(self, folder: Path) -> Any:
        return self.texts.load(folder)

    def scores(self, model: Any, rows: Rows) -> Scores:
        import torch

        logits, labels = self.texts.outputs(model, rows[:, 1:]), torch.from_numpy(np.ascontiguousarray(rows[:, 0]))
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        right = (logits.argmax(1) == labels).double()
        return Scores(losses.double().numpy(), {ACCURACY: right.numpy()}, (ACCURACY,))

    def surprise(self, model: Any, known: Rows, fresh: Rows) -> tuple[Figures, Figures]:
        return self.scores(model, known).losses, self.scores(model, fresh).losses

    def loss(self, training: Training) -> Callable[[Rows], torch.Tensor]:
        """Cross-entropy of the labels, and the pull: the KL divergence of the previous version's from this one's on the
        replayed rows."""
        import torch

        forward = self.texts.trained_forward(training.model)
        before, old = self.texts.forward(training.previous), training.replayed

        def loss(batch: Rows) -> torch.Tensor:
            logits = forward(batch[:, 1:]).float()
            labels = torch.from_numpy(np.ascontiguousarray(batch[:, 0]))
            total = torch.nn.functional.cross_entropy(logits, labels)
            if training.pull and old:
                with torch.no_grad():
                    known = before(batch[-old:, 1:]).float().log_softmax(-1)
                total = total + training.pull * torch.nn.functional.kl_div(
                    logits[-old:].log_softmax(-1), known, log_target=True, reduction="batchmean"
                )
            return total

        return loss

    def tokens(self, batch: Rows) -> int:
        return tokens_of(batch[:, 1:])


def _labelled(label: int, text: str) -> Document:
    """Its name is of the text, so that one that comes twice is not held out and learnt at once."""
    return Document(f"text {text}", (str(label), text))
