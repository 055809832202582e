"""What the outputs of a classifier mean, as its checkpoint says."""

from __future__ import annotations

from builders.artifacts import Checkpoint
from builders.checkpoint.reading import read_optional


def label_names(checkpoint: Checkpoint) -> tuple[tuple[str, ...], bool]:
    """Names in the order of the outputs, and whether each is true or not by itself. None where the task has no labels;
    transformers' own names where the checkpoint gives none."""
    if checkpoint.task != "classification":
        return (), False
    config = read_optional(checkpoint.directory / "config.json")
    given = config.get("id2label")
    names = {str(number): str(name) for number, name in given.items()} if isinstance(given, dict) else {}
    multi_label = config.get("problem_type") == "multi_label_classification"
    return tuple(names.get(str(place), f"LABEL_{place}") for place in range(checkpoint.labels)), multi_label
