"""The task that a spec's model has to learn."""

from __future__ import annotations

from builders.artifacts import Checkpoint
from builders.spec import ModelSlice
from online.tasks.classifying import ClassifierTask
from online.tasks.embedding import EmbeddingTask
from online.tasks.encoder import EncoderTexts
from online.tasks.language import LanguageTask
from online.tasks.task import LearningTask


def open_task(model: ModelSlice, checkpoint: Checkpoint, window: int) -> LearningTask:
    """`window`: tokens of a text, or of a row of text. Raises InputError for a model that cannot learn so."""
    if model.task == "generation":
        return LanguageTask.of(checkpoint, window)
    texts = EncoderTexts(model, checkpoint, window)
    return EmbeddingTask(texts) if model.task == "embedding" else ClassifierTask.of(texts, checkpoint)
