"""What embeddings and classifiers share: texts side by side in a row of token ids, and an encoder that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.checkpoint.reading import read_json
from builders.export.encoder import graph_module
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder
from builders.judging.vectors import tokenizer_settings
from builders.spec import ModelSlice
from builders.training.arithmetic import arithmetic
from online.tasks.task import Rows
from runtime.encoding.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

NOTHING = -1  # in a row, behind the tokens of a text
_BATCH = 32

Forward = Callable[[Rows], "torch.Tensor"]  # [texts, window] -> [texts, width]


class EncoderTexts:
    """Texts as the service reads them: with the model's own prompt before each, and cut after `window` tokens. What
    stands behind the pooling is the checkpoint's, and no update moves it."""

    def __init__(self, model: ModelSlice, checkpoint: Checkpoint, window: int) -> None:
        self.window = window
        self._model, self._checkpoint = model, checkpoint

    @property
    def labels(self) -> int:
        return self._checkpoint.labels

    @cached_property
    def _vocabulary(self) -> int:
        return int(read_json(self._checkpoint.path("config.json"))["vocab_size"])

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        settings = tokenizer_settings(self._checkpoint).model_copy(update={"max_length": self.window})
        return Tokenizer(self._checkpoint.path("tokenizer.json"), settings)

    @cached_property
    def _head(self) -> list[torch.nn.Module]:
        modules = head_modules(self._checkpoint)
        for module in modules:
            module.requires_grad_(False)
        return modules

    def pack(self, texts: Sequence[str]) -> Rows:
        """[texts, window]"""
        found = np.full((len(texts), self.window), NOTHING, np.int64)
        for row, item in zip(found, self._tokenizer.encode(texts) if texts else (), strict=True):
            row[: len(item.ids)] = item.ids
        return found

    def fault(self, ids: Rows) -> str | None:
        if ids.min() < NOTHING or ids.max() >= self._vocabulary:
            return f"ids from {ids.min()} to {ids.max()}, not all of them below {self._vocabulary}"
        return None

    def load(self, folder: Path) -> Any:
        """Of a version's folder, which has the settings of the first."""
        model = load_encoder(load_checkpoint(self._model.model_copy(update={"source": str(folder), "revision": None})))
        if self._checkpoint.task == "embedding":  # it pools the tokens' states itself
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.startswith("pooler."))
        return model

    def forward(self, model: Any) -> Forward:
        """Without dropout: a version that is pulled towards another is compared with it, not with chance."""
        import torch

        module = graph_module(model.eval(), self._head, self._checkpoint)
        settings = tokenizer_settings(self._checkpoint)

        def forward(ids: Rows) -> torch.Tensor:
            seen = ids != NOTHING
            longest = max(int(seen.sum(1).max()), 1)
            read = np.where(seen, ids, settings.pad_id)[:, :longest]
            found: torch.Tensor = module(torch.from_numpy(read), torch.from_numpy(seen[:, :longest].astype(np.int64)))
            return found

        return forward

    def outputs(self, model: Any, ids: Rows) -> torch.Tensor:
        """[texts, width] without gradients; texts of like length go together."""
        import torch

        forward = self.forward(model)
        order = np.argsort((ids != NOTHING).sum(1), kind="stable")
        with torch.no_grad():
            found = [forward(ids[order[first : first + _BATCH]]) for first in range(0, len(ids), _BATCH)]
        return torch.cat(found)[torch.from_numpy(np.argsort(order))]

    def trained_forward(self, model: Any) -> Forward:
        """For gradients. In bf16, torch's fused attention takes half of a step in its backward pass."""
        if arithmetic() == "bfloat16":
            model.set_attn_implementation("eager")
        return self.forward(model)


def tokens_of(ids: Rows) -> int:
    return int((ids != NOTHING).sum())
