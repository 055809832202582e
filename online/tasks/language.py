"""A language model: rows of text, the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.artifacts import Checkpoint
from builders.judging import corpus
from builders.judging.corpus import Document
from builders.training import text
from online.tasks.reading import unread_kind
from online.tasks.task import Figures, Rows, Scores, Training
from runtime.errors import InputError
from runtime.tokenizer_file import open_tokenizer

if TYPE_CHECKING:
    import torch

_BATCH = 16


@dataclass(frozen=True)
class LanguageTask:
    """A row is `window + 1` tokens of text, of which all but the first are predicted. `tokenizer`: its file; `end`: the
    token between two texts. Both are read where feedback becomes rows."""

    window: int
    vocabulary: int
    tokenizer: Path
    end: int

    @staticmethod
    def of(checkpoint: Checkpoint, window: int) -> LanguageTask:
        facts = checkpoint.generation
        if facts is None or not facts.eos_ids:
            raise InputError(
                f"model {checkpoint.source}", got="no token that ends a text", expected="eos_token_id in config.json",
                fix="name one there",
            )  # fmt: skip
        return LanguageTask(window, facts.vocabulary, checkpoint.path("tokenizer.json"), facts.eos_ids[0])

    @property
    def width(self) -> int:
        return self.window + 1

    @property
    def together(self) -> int:
        return 1

    @property
    def predictions(self) -> int:
        return self.window

    def window_of(self, width: int) -> int:
        return width - 1

    def read(self, sample: Mapping[str, Any], min_rating: float) -> Document | str:
        """What should have been said, after what was asked where that is kept."""
        name, prompt = f"{sample['request_id']} {sample['kind']}", sample.get("prompt") or ""
        if sample["kind"] == "correction":
            return Document(name, (str(prompt + sample["text"]),))
        if sample["kind"] == "pair":
            return Document(name, (f"{sample['query']}\n{sample['positive']}",))
        if (why := unread_kind("generation", sample["kind"])) is not None:
            return why
        if sample["score"] < min_rating:
            return f"a rating under online.learner.min_rating ({min_rating:g})"
        if not prompt or not sample.get("answer"):
            return "a rating of texts that nobody kept"
        return Document(name, (str(prompt + sample["answer"]),))

    def past(self, file: Path | None) -> tuple[Sequence[Document], str]:
        if file is None:
            return corpus.documents(), "text of Python's own"
        return [Document(line, (line,)) for line in corpus.texts(file, None)], f"old texts in {file}"

    def rows(self, documents: Sequence[Document]) -> Rows:
        """All documents one after the other, each between ends of text."""
        return text.windows(text.to_tokens(open_tokenizer(self.tokenizer), documents, self.end), self.window)

    def fault(self, rows: Rows) -> str | None:
        if rows.min() < 0 or rows.max() >= self.vocabulary:
            return f"ids from {rows.min()} to {rows.max()}, not all of them below {self.vocabulary}"
        return None

    def load(self, folder: Path) -> Any:
        return load_language_model(folder)

    def scores(self, model: Any, rows: Rows) -> Scores:
        return Scores(row_losses(model, rows))

    def surprise(self, model: Any, known: Rows, fresh: Rows) -> tuple[Figures, Figures]:
        return row_losses(model, known), row_losses(model, fresh)

    def loss(self, training: Training) -> Callable[[Rows], torch.Tensor]:
        """Cross-entropy of all rows, in nats a token, and the pull: the KL divergence of the previous version from this
        one on the replayed rows."""
        import torch

        model, old = training.model.train(), training.replayed

        def loss(batch: Rows) -> torch.Tensor:
            ids = torch.from_numpy(np.ascontiguousarray(batch))
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()  # [rows, window, vocabulary]
            total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            if training.pull and old:
                with torch.no_grad():
                    known = training.previous(input_ids=ids[-old:, :-1], use_cache=False).logits.float().log_softmax(-1)
                here = logits[-old:].log_softmax(-1)
                total = total + training.pull * torch.nn.functional.kl_div(
                    here.flatten(0, 1), known.flatten(0, 1), log_target=True, reduction="batchmean"
                )
            return total

        return loss

    def tokens(self, batch: Rows) -> int:
        return batch.shape[0] * (batch.shape[1] - 1)


def load_language_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)


def row_losses(model: Any, rows: Rows) -> Figures:
    """Mean nats a token of each row of [rows, window + 1]."""
    import torch

    found = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, len(rows), _BATCH):
            ids = torch.from_numpy(np.ascontiguousarray(rows[first : first + _BATCH]))
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            found.append(losses.mean(1).double().numpy())
    model.train(training)
    return np.concatenate(found)
