"""`trireme package`: OpenVINO's own files, which its own runtime reads and which are held to the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from builders.artifacts import FileRecord
from builders.errors import InputError, QualityError, UnsupportedError
from builders.pipeline import edge, one_file
from builders.pipeline.edge import PackageRecord
from builders.spec import ModelSlice, PrecisionSlice
from runtime.session import open_session

BUDGET = PrecisionSlice(calibration_samples=8)


@pytest.fixture(scope="module")
def graph(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graph") / "m.onnx"
    model = ModelSlice.model_validate(
        {"source": str(tiny_bert), "task": "embedding", "pooling": "mean", "max_length": 64}
    )
    one_file.export(model, "fp32", file)
    return file


def test_openvino_reads_its_files_and_gives_the_vectors_of_the_graph(graph: Path, tmp_path: Path) -> None:
    import openvino

    record = edge.package(graph, BUDGET, tmp_path / "m.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml", "m.xml.json"]
    assert PackageRecord.model_validate_json((tmp_path / "m.xml.json").read_text()) == record
    assert record.files == tuple(FileRecord.of(tmp_path / name) for name in ("m.xml", "m.bin"))
    assert record.source == FileRecord.of(graph)
    assert "OpenVINO" in record.quality.executor
    assert record.quality.worst_cosine > 0.9999
    session = open_session(graph)
    ids = np.arange(5, 17)[None]
    feeds = {item.name: np.zeros_like(ids) if "type" in item.name else ids for item in session.get_inputs()}
    feeds["attention_mask"] = np.ones_like(ids)
    compiled = openvino.Core().compile_model(tmp_path / "m.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.allclose(compiled(feeds)[0], session.run(None, feeds)[0], atol=1e-4)


@pytest.mark.slow
def test_a_graph_over_the_budget_of_fp32_leaves_nothing(graph: Path, tmp_path: Path) -> None:
    """It is judged against the checkpoint in fp32, not against itself."""
    model = onnx.load(str(graph))
    largest = max(model.graph.initializer, key=lambda item: int(np.prod(item.dims)))
    noise = np.random.default_rng(0).normal(size=tuple(largest.dims)).astype(np.float32)
    largest.CopyFrom(onnx.numpy_helper.from_array(noise, largest.name))
    wrong, out = tmp_path / "wrong.onnx", tmp_path / "out"
    out.mkdir()
    onnx.save(model, str(wrong))
    recorded = graph.with_name("m.onnx.json").read_text()
    before, after = FileRecord.of(graph), FileRecord.of(wrong)
    recorded = (
        recorded.replace(before.sha256, after.sha256)
        .replace('"m.onnx"', '"wrong.onnx"')
        .replace('"precision": "fp32"', '"precision": "fp16"')
    )
    wrong.with_name("wrong.onnx.json").write_text(recorded)
    with pytest.raises(QualityError, match=r"OpenVINO package of .* misses the quality budget on 128 held-out texts"):
        edge.package(wrong, BUDGET, out / "m.xml")
    assert not list(out.iterdir())


def test_what_its_converter_cannot_do_is_refused_with_the_reason(tmp_path: Path) -> None:
    node = helper.make_node("Nonesuch", ["x"], ["y"], domain="of.nobody")
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("of.nobody", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [given], [made]), opset_imports=opsets, ir_version=10),
              str(tmp_path / "odd.onnx"))  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"OpenVINO's converter says: (?s:.*)Nonesuch"):
        edge._converted(tmp_path / "odd.onnx", tmp_path / "odd.xml")
    assert not (tmp_path / "odd.xml").exists()


def test_a_name_that_openvino_would_not_find_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--output: got .*m\.onnx; expected a name that ends in \.xml"):
        edge.package(graph, BUDGET, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
