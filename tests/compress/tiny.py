"""A tiny model as a technique gets it, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.compress.step import carry_out
from builders.compress.texts import Batch, CalibrationText, batches
from builders.export.encoder import graph_module
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder
from builders.judging import corpus, vectors
from builders.spec import DeploymentSpec, PrecisionSlice, StepSlice
from tests.conftest import tiny_spec

BUDGET = PrecisionSlice(calibration_samples=16)


@dataclass
class Tiny:
    checkpoint: Checkpoint
    model: Any

    @staticmethod
    def of(folder: Path, task: str = "embedding") -> Tiny:
        checkpoint = load_checkpoint(tiny_spec(folder, task).model)
        return Tiny(checkpoint, load_encoder(checkpoint))

    def forward_of(self, model: Any) -> Callable[..., torch.Tensor]:
        return graph_module(model, head_modules(self.checkpoint), self.checkpoint)

    def batches(self, texts: int = 24) -> list[Batch]:
        return batches(vectors.sample_requests(self.checkpoint, corpus.texts(None, texts)))

    def outputs(self, given: Sequence[Batch] | None = None) -> NDArray[np.float32]:
        with torch.no_grad():
            return torch.cat([self.forward_of(self.model)(**batch) for batch in given or self.batches()]).numpy()

    def carry_out(self, step: dict[str, dict[str, object]], tensor: int = 1) -> list[str]:
        texts = CalibrationText(self.checkpoint, BUDGET)
        asked = StepSlice.model_validate(step)
        return carry_out(asked, self.model, self.forward_of, self.checkpoint, texts, tensor)


def compressing(source: Path, steps: list[dict[str, object]], task: str = "embedding", **more: Any) -> DeploymentSpec:
    """A tiny spec with steps and, unless `more` says so, a budget that anything meets."""
    spec = tiny_spec(source, task, **{key: value for key, value in more.items() if key != "budget"})
    budget = more.get("budget", {"min_mean_cosine": 0} if steps else None)
    return DeploymentSpec.model_validate({**spec.model_dump(), "compress": steps, "budget": budget})
