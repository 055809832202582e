"""Single stages on single files, for every task: an encoder-decoder's two graphs lie beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders.errors import InputError, QualityError
from builders.pipeline import edge, one_file
from builders.spec import ModelSlice, PrecisionSlice
from tests.generators import save_generator

BUDGET = PrecisionSlice(max_perplexity_ratio=1.5, calibration_samples=8)  # random weights: any loss shows


@pytest.mark.parametrize(
    ("kind", "task", "files"),
    [
        ("llama", "generation", ["m.onnx", "m.onnx.json"]),
        pytest.param("t5", "seq2seq", ["m.encoder.onnx", "m.onnx", "m.onnx.json"], marks=pytest.mark.slow),
    ],
)
def test_language_models_from_checkpoint_to_weights_in_8_bits(
    tmp_path: Path, kind: str, task: str, files: list[str]
) -> None:
    source = save_generator(tmp_path / "checkpoint", kind)
    out, small = tmp_path / "out", tmp_path / "small"
    out.mkdir()
    small.mkdir()
    model = ModelSlice.model_validate({"source": str(source), "task": task, "max_length": 64})
    graph, _ = one_file.export(model, "fp32", out / "m.onnx")
    assert sorted(path.name for path in out.iterdir()) == files
    with pytest.raises(InputError, match="got int8 with a graph of task"):
        one_file.quantize(out / "m.onnx", "int8", BUDGET, small / "m.onnx")
    with pytest.raises(InputError, match=f"got a graph of task {task}; expected an encoder's"):
        edge.package(out / "m.onnx", "openvino", BUDGET, small / "m.xml")
    assert not list(small.iterdir())
    result = one_file.quantize(out / "m.onnx", None, BUDGET, small / "m.onnx")
    assert (graph.precision, result.precision) == ("fp32", "w8")
    assert result.bytes < graph.bytes
    assert sorted(path.name for path in small.iterdir()) == files
    with pytest.raises(InputError, match="got a graph in w8; expected fp32 or fp16"):
        one_file.quantize(small / "m.onnx", "w4", BUDGET, small / "n.onnx")


def test_an_encoder_from_checkpoint_to_weights_in_4_bits(tiny_bert: Path, tmp_path: Path) -> None:
    model = ModelSlice(source=str(tiny_bert), task="embedding", pooling="mean", max_length=64)
    budget = PrecisionSlice(min_mean_cosine=0.9, min_worst_cosine=0.8, calibration_samples=32)
    for precision in ("fp32", "fp16"):
        one_file.export(model, precision, tmp_path / f"{precision}.onnx")
    result = one_file.quantize(tmp_path / "fp32.onnx", "w4", budget, tmp_path / "w4.onnx")
    assert result.precision == "w4"
    assert result.bytes < (tmp_path / "fp32.onnx").stat().st_size
    with pytest.raises(InputError, match="got a graph in fp16 for --scheme w4; expected fp32"):
        one_file.quantize(tmp_path / "fp16.onnx", "w4", budget, tmp_path / "none.onnx")
    with pytest.raises(QualityError):
        one_file.quantize(tmp_path / "fp32.onnx", "w4", PrecisionSlice(min_mean_cosine=1.0), tmp_path / "none.onnx")
    assert not (tmp_path / "none.onnx").exists()
