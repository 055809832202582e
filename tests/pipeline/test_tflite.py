"""`trireme package --target tflite`, by Google's converter in an environment of its own: `make litert`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builders.edge.tflite import LITERT
from builders.pipeline import edge, one_file
from builders.spec import ModelSlice, PrecisionSlice
from tests import ROOT
from tests.conftest import save_tiny

BUDGET = PrecisionSlice(calibration_samples=8)
needs_litert = pytest.mark.skipif("LITERT_PYTHON" not in os.environ, reason="LiteRT's environment: `make litert`")


def test_the_command_names_the_versions_that_are_tested() -> None:
    pinned = (ROOT / "tests" / "pipeline" / "litert-requirements.txt").read_text().split()
    assert set(LITERT) <= set(pinned)


@needs_litert
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "pooling"),
    [("bert", "embedding", "mean"), ("mpnet", "embedding", "cls"), ("bert", "reranking", None),
     ("distilbert", "classification", None)],
)  # fmt: skip
def test_litert_reads_its_file_and_gives_what_the_graph_gives(
    tmp_path: Path, family: str, task: str, pooling: str | None
) -> None:
    save_tiny(tmp_path / "model", family, task, labels=1 if task == "reranking" else 3)
    model = {"source": str(tmp_path / "model"), "task": task, "pooling": pooling, "max_length": 64}
    source, out = tmp_path / "m.onnx", tmp_path / "out"
    out.mkdir()
    one_file.export(ModelSlice.model_validate(model), "fp32", source)
    record = edge.package(source, "tflite", BUDGET, out / "m.tflite", os.environ["LITERT_PYTHON"])
    assert sorted(path.name for path in out.iterdir()) == ["m.tflite", "m.tflite.json"]
    assert record.quality.executor.startswith("LiteRT ")
    assert record.quality.worst_cosine > 0.9999
    assert record.length == 64


@needs_litert
@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    one_file.export(ModelSlice(source="packaged:all-MiniLM-L6-v2", task="embedding"), "fp32", tmp_path / "m.onnx")
    record = edge.package(
        tmp_path / "m.onnx", "tflite", PrecisionSlice(), tmp_path / "m.tflite", os.environ["LITERT_PYTHON"]
    )
    assert record.quality.worst_cosine > 0.9999
