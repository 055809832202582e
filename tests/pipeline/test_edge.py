"""`trireme package`: files of runtimes for small devices, which the makers' own runtimes read and which are held to the
budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from builders.artifacts import FileRecord
from builders.edge.openvino import convert_file
from builders.edge.script import EdgeScript, ScriptFailed
from builders.errors import InputError, MachineError, QualityError, UnsupportedError
from builders.pipeline import edge, one_file
from builders.pipeline.edge import PackageRecord
from builders.pipeline.one_file import read_recorded
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

    record = edge.package(graph, "openvino", BUDGET, tmp_path / "m.xml")
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
    with pytest.raises(QualityError, match=r"openvino package of .* misses the quality budget on 128 held-out texts"):
        edge.package(wrong, "openvino", BUDGET, out / "m.xml")
    assert not list(out.iterdir())


def test_what_its_converter_cannot_do_is_refused_with_the_reason(tmp_path: Path) -> None:
    node = helper.make_node("Nonesuch", ["x"], ["y"], domain="of.nobody")
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("of.nobody", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [given], [made]), opset_imports=opsets, ir_version=10),
              str(tmp_path / "odd.onnx"))  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"OpenVINO's converter says: (?s:.*)Nonesuch"):
        convert_file(tmp_path / "odd.onnx", tmp_path / "odd.xml")
    assert not (tmp_path / "odd.xml").exists()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mnn_reads_its_file_and_gives_the_vectors_of_the_graph(
    graph: Path, tiny_bert: Path, tmp_path: Path, precision: Literal["fp32", "fp16"]
) -> None:
    """Of texts in batches of several lengths: a norm over a whole batch would be told."""
    version = pytest.importorskip("MNN", reason="MNN: pip install 'trireme[edge]'").version()
    source, out = graph, tmp_path / "out"
    out.mkdir()
    if precision == "fp16":
        source = tmp_path / "half.onnx"
        one_file.export(read_recorded(graph)[1], "fp16", source)
    record = edge.package(source, "mnn", BUDGET, out / "m.mnn")
    assert sorted(path.name for path in out.iterdir()) == ["m.mnn", "m.mnn.json"]
    assert record.files == (FileRecord.of(out / "m.mnn"),)
    assert record.quality.executor == f"MNN {version}"
    assert record.quality.worst_cosine > 0.999
    assert record.files[0].bytes < 0.7 * graph.stat().st_size or precision == "fp32"  # fp16 stays so


@pytest.mark.parametrize(("target", "said"), [("mnn", "widens the weights of an INT8 graph"), ("tflite", "in fp32")])
def test_a_graph_in_int8_is_refused_with_the_reason(
    graph: Path, tmp_path: Path, target: Literal["mnn", "tflite"], said: str
) -> None:
    recorded = graph.with_name("m.onnx.json").read_text().replace('"precision": "fp32"', '"precision": "int8"')
    copy = tmp_path / "m.onnx"
    copy.write_bytes(graph.read_bytes())
    copy.with_name("m.onnx.json").write_text(recorded)
    with pytest.raises(UnsupportedError, match=rf"for {target}: got a graph in int8; expected fp32.*{said}"):
        edge.package(copy, target, BUDGET, tmp_path / f"m.{target}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


@pytest.mark.parametrize(
    ("python", "got"), [(None, "none"), ("/nonexistent/python", "No such file"), (sys.executable, "litert-torch")]
)
def test_without_googles_converter_the_command_says_what_to_install(
    graph: Path, tmp_path: Path, python: str | None, got: str
) -> None:
    with pytest.raises(
        MachineError,
        match=rf"(?s)--litert-python.*{got}.*venv litert && litert/bin/pip install torch==\S+ litert-torch==",
    ):
        edge.package(graph, "tflite", BUDGET, tmp_path / "m.tflite", python)
    assert not list(tmp_path.iterdir())


def test_an_option_of_another_target_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--litert-python: got an interpreter for --target openvino"):
        edge.package(graph, "openvino", BUDGET, tmp_path / "m.xml", sys.executable)


def test_vectors_of_another_length_are_refused_though_their_cosines_are_right(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(str(graph))
    node = next(node for node in model.graph.node if "embedding" in node.output)
    node.output[0] = "shorter"
    model.graph.initializer.append(helper.make_tensor("fifth", TensorProto.FLOAT, [], [0.2]))
    model.graph.node.append(helper.make_node("Mul", ["shorter", "fifth"], ["embedding"]))
    onnx.save(model, str(tmp_path / "short.onnx"))
    convert_file(tmp_path / "short.onnx", tmp_path / "m.xml")
    reference, _, checkpoint = read_recorded(graph)
    with pytest.raises(QualityError, match=r"vectors are 0\.20 to 0\.20 times as long as those of fp32"):
        edge._judged(edge.OPENVINO, tmp_path / "m.xml", reference, checkpoint, BUDGET)


def test_a_script_that_fails_is_quoted_without_its_stack(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("print('These Op Not Support: ONNX::Nonesuch')\nraise ValueError('of two')\n")
    with pytest.raises(ScriptFailed) as failed:
        EdgeScript(sys.executable, script).run()
    assert str(failed.value) == "exit 1: These Op Not Support: ONNX::Nonesuch\nValueError: of two"


def test_a_name_that_openvino_would_not_find_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--output: got .*m\.onnx; expected a name that ends in \.xml"):
        edge.package(graph, "openvino", BUDGET, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
