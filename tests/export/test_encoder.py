"""Every supported architecture becomes one standard graph that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.artifacts import Quality
from builders.checkpoint import ENCODERS, load_checkpoint
from builders.errors import CheckpointError, ParityError, QualityError
from builders.export.encoder import export_encoder
from builders.graph import require_standard
from builders.judging import corpus
from builders.judging.vectors import measure, require_budget
from builders.spec import ModelSlice, PrecisionSlice
from tests import ROOT
from tests.conftest import save_tiny, tiny_spec


# A reranker's graph is the encoder with a head behind it, so one plain encoder is enough.
@pytest.mark.parametrize(
    ("model_type", "task"),
    [(kind, "reranking") for kind in ENCODERS]
    + [pytest.param(kind, "embedding", marks=() if kind == "bert" else pytest.mark.slow) for kind in ENCODERS],
)
def test_architectures_and_tasks(tmp_path: Path, model_type: str, task: str) -> None:
    source = save_tiny(tmp_path / "checkpoint", model_type, task, labels=1 if task == "reranking" else 3)
    checkpoint = load_checkpoint(tiny_spec(source, task).model)
    out = tmp_path / "graph"
    out.mkdir()
    graph = export_encoder(checkpoint, "fp32", corpus.texts(None, 32), out)
    assert graph.quality.max_abs_difference < 1e-5
    assert graph.outputs[0].dims == ("batch", 32 if task == "embedding" else 1)
    assert ("token_type_ids" in {item.name for item in graph.inputs}) == checkpoint.token_type_ids


def test_fp16_and_classification(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "checkpoint", "bert", "classification", labels=5)
    checkpoint = load_checkpoint(tiny_spec(source, "classification").model)
    out = tmp_path / "graph"
    out.mkdir()
    graph = export_encoder(checkpoint, "fp16", corpus.texts(None, 32), out)
    assert graph.outputs[0].dtype == "float32"  # the head stays in fp32 in every precision
    assert graph.outputs[0].dims == ("batch", 5)
    assert graph.quality.worst_cosine > 0.9999


def test_the_graph_holds_no_path_and_rests(tiny_bert: Path, tmp_path: Path) -> None:
    """Two exports of the same weights are the same file, so that digests mean something."""
    checkpoint = load_checkpoint(tiny_spec(tiny_bert).model)
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        graph = export_encoder(checkpoint, "fp32", corpus.texts(None, 8), tmp_path / name)
        digests.append(graph.digest)
        assert str(ROOT).encode() not in graph.file_path.read_bytes()
    assert digests[0] == digests[1]


def test_weights_that_are_missing_are_never_random(tiny_bert: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_spec(tiny_bert, "classification").model)  # saved without a head
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        export_encoder(checkpoint, "fp32", corpus.texts(None, 8), tmp_path)


def test_a_foreign_operator_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("FusedThing", ["x"], ["y"], domain="com.vendor")
    graph = helper.make_graph([node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.vendor", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "g.onnx")
    with pytest.raises(ParityError, match=r"com\.vendor"):
        require_standard(tmp_path / "g.onnx")


def test_nan_and_noise_never_pass_a_budget() -> None:
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(16, 8))
    poisoned = reference.copy()
    poisoned[3, 2] = np.nan
    noisy = reference + generator.normal(size=reference.shape)
    budget = PrecisionSlice(min_mean_cosine=0.99, min_worst_cosine=0.9)
    for candidate in (poisoned, noisy, np.zeros_like(reference)):
        for task in ("embedding", "reranking"):
            with pytest.raises(QualityError, match="misses the quality budget"):
                require_budget(measure(reference, candidate, task, "test"), budget, "candidate")  # type: ignore[arg-type]
    fine: Quality = measure(reference, reference + 1e-6, "embedding", "test")
    require_budget(fine, budget, "candidate")


def test_shifted_and_scaled_logits_never_pass_a_budget() -> None:
    """Correlation sees neither, and both change which label wins."""
    reference = np.random.default_rng(0).normal(size=(200, 2)) * 3
    wrong = reference * [0.2, 1] + [5, 0]
    budget = PrecisionSlice()
    for candidate in (wrong, reference * 0.5, reference + np.array([1, 0])):
        found = measure(reference, candidate, "classification", "test")
        assert found.mean_cosine > 0.99999
        with pytest.raises(QualityError, match=r"logits off by \d+\.\d% of their spread \(budget 20%\)"):
            require_budget(found, budget, "candidate")
    found = measure(reference, wrong, "classification", "test")
    assert found.agreement == (reference.argmax(axis=1) == wrong.argmax(axis=1)).mean() < 0.6
    assert "agree" in found.summary
    near = measure(
        reference, reference + 0.1 * np.random.default_rng(1).normal(size=(200, 2)), "classification", "test"
    )
    require_budget(near, budget, "candidate")
    assert near.agreement is not None
    assert near.agreement > 0.95


def test_of_one_score_the_order_counts() -> None:
    scores = np.arange(10.0)[:, None]
    swapped = scores[[1, 0, *range(2, 10)]]
    assert measure(scores, scores * 2 + 1, "reranking", "test").agreement == 1
    assert measure(scores, -scores, "reranking", "test").agreement == 0
    assert measure(scores, swapped, "reranking", "test").agreement == pytest.approx(44 / 45)
    constant = measure(np.ones((5, 1)), np.ones((5, 1)), "reranking", "test")
    assert (constant.logit_error, constant.agreement) == (0, 1)
    assert measure(scores, scores, "embedding", "test").logit_error is None


def test_weights_of_another_shape_are_refused(bert_copy: Path, edit_json: Any, tmp_path: Path) -> None:
    edit_json(bert_copy / "config.json", {"intermediate_size": 48})
    checkpoint = load_checkpoint(tiny_spec(bert_copy).model)
    with pytest.raises(CheckpointError, match="of another shape"):
        export_encoder(checkpoint, "fp32", corpus.texts(None, 8), tmp_path)


def test_texts_at_the_end_of_the_position_table(tmp_path: Path) -> None:
    """RoBERTa: 80 positions, the first two for padding; 77 tokens padded to a round 80 would run off the table."""
    source = save_tiny(tmp_path / "checkpoint", "roberta")
    model = ModelSlice(source=str(source), task="embedding", pooling="cls", max_length=77)
    (tmp_path / "graph").mkdir()
    graph = export_encoder(load_checkpoint(model), "fp32", ["long text " * 90, "short"], tmp_path / "graph")
    assert graph.quality.max_abs_difference < 1e-5
