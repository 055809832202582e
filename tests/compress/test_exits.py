"""Exits that a model's own last layer teaches: their loss by hand, what is left, a kill, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.nn import functional

from builders.checkpoint import load_checkpoint
from builders.checkpoint.widths import layers_of
from builders.compress import prune
from builders.compress.distil import DistilLesson, Teaching
from builders.compress.distil_plan import Teacher
from builders.compress.exits import Exits, distil_exits
from builders.compress.plan import check
from builders.compress.texts import CalibrationText
from builders.errors import SpecError
from builders.export.encoder import write_graph
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder
from builders.pipeline.compress import carried_out
from builders.pipeline.opened import pooled
from builders.pipeline.result import Build
from builders.spec import DistilSlice, PrecisionSlice, StepSlice
from builders.store.store import Store
from tests.compress.killed import assert_same_weights, resumed_and_whole
from tests.compress.test_distil import TRAINED, _kill, texts  # noqa: F401
from tests.compress.test_spec import WIDTHS
from tests.compress.tiny import Tiny, compressing

ASKED = {**TRAINED, "exits": [1], "exit": 1}


def _teaching(folder: Path, tiny: Tiny, **more: Any) -> Teaching:
    teacher = copy.deepcopy(tiny.model)
    return Teaching(teacher, tiny.forward_of(teacher), folder / "states", folder / "scratch", "key", **more)


def test_the_loss_is_what_it_says(tiny_bert: Path, tmp_path: Path) -> None:
    """Each exit by the model of its layers alone; and none of the exits' gradients reaches the last layer."""
    tiny = Tiny.of(tiny_bert)
    teaching = _teaching(tmp_path, tiny, numbers="float32")
    with torch.no_grad():
        layers_of(tiny.model)[1].output.dense.weight.mul_(1.5)  # away from the original
    asked = DistilSlice.model_validate({"tokens": 9, "exits": [1], "exit": 1})
    batch = tiny.batches(8)[0]
    exits = Exits(asked, tiny.model, (tiny.forward_of, pooled(tiny.checkpoint)), teaching)
    found: Any = exits.loss(DistilLesson(0, batch, None))

    def seen(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        states = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        return states, tiny.forward_of(model)(**batch)

    def far(one: Any, other: Any) -> Any:
        return (one[0] - other[0]).square().mean() + 4 * (1 - functional.cosine_similarity(one[1], other[1]).mean())

    short = copy.deepcopy(tiny.model)
    prune.keep_layers(short, [0])
    with torch.no_grad():
        original, own = seen(teaching.model), seen(tiny.model)
    assert found.item() == pytest.approx(
        (far(own, original) + far(seen(short), own)).item(), rel=1e-3
    )  # states in fp16
    vectors = exits.outputs([DistilLesson(0, batch, None)])
    assert torch.allclose(torch.from_numpy(vectors[1]), seen(short)[1], atol=1e-5)
    assert torch.allclose(torch.from_numpy(vectors[2]), own[1], atol=1e-5)
    far(seen(tiny.model), original).backward()
    weight = layers_of(tiny.model)[1].output.dense.weight
    wanted, weight.grad = weight.grad.clone(), None
    found.backward()
    assert torch.allclose(weight.grad, wanted, rtol=1e-2, atol=1e-5)  # the last layer learns from the original alone


def test_an_exit_becomes_an_ordinary_model(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:  # noqa: F811
    precision = {"calibration_texts": str(texts), "calibration_samples": 16}
    spec = compressing(tiny_bert, [{"distil": ASKED}], precision=precision)
    built = Build(spec, "cpu", load_checkpoint(spec.model))
    made = carried_out(built, Store(tmp_path / "store"), lambda stage, message: None).checkpoint
    notes = json.loads(made.path("compression.json").read_text())[-1]["notes"]
    assert notes[0] == "layers 2 -> 1"
    means = [tuple(map(float, note.partition("mean ")[2].partition(",")[0].split(" -> "))) for note in notes[2:-1]]
    assert [note.partition(":")[0] for note in notes[2:-1]] == ["exit 1", "the last layer"]
    assert means[0][0] < means[0][1]
    assert means[1][0] == pytest.approx(1, abs=1e-4)  # it is the original, and is held to it
    assert "<svg" in (made.directory / "distil.html").read_text()
    left = load_encoder(made)
    assert len(layers_of(left)) == 1
    write_graph(left, head_modules(made), made, "fp32", tmp_path / "g.onnx")
    products = [node for node in onnx.load(tmp_path / "g.onnx").graph.node if node.op_type in ("MatMul", "Gemm")]
    assert 6 <= len(products) <= 8  # of one layer: six, and two of attention where it is not one node


def _distilled(folder: Path, source: Path, texts: Path, **more: Any) -> Tiny:  # noqa: F811
    tiny = Tiny.of(source)
    asked, budget = DistilSlice.model_validate(ASKED), PrecisionSlice(calibration_texts=texts, calibration_samples=16)
    given = CalibrationText(tiny.checkpoint, budget)
    ways = tiny.forward_of, pooled(tiny.checkpoint)
    distil_exits(asked, tiny.model, ways, tiny.checkpoint, given, _teaching(folder, tiny, **more))
    return tiny


def test_after_a_kill_it_comes_to_the_same_weights(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:  # noqa: F811
    resumed, whole = resumed_and_whole(_distilled, _kill, (tiny_bert, texts), tmp_path, 0.5)
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"exits": [2, 4]}, "exits and exit go together"),
        ({"exit": 2}, "exits and exit go together"),
        ({"exits": [2, 4], "exit": 3}, "exit=3 is none of"),
        ({"exits": [4, 2], "exit": 2}, "in rising order"),
        ({"exits": [], "exit": 2}, "at least one"),
        ({"exits": [0, 2], "exit": 2}, "greater than 0"),
        ({"exits": [2], "exit": 2, "student_layers": [0, 1, 2]}, "student_layers and exits do not go together"),
        ({"exits": [2], "exit": 2, "sparsity": {"amount": 0.5}}, "sparsity and exits do not go together"),
        ({"exits": [2], "exit": 2, "losses": {"hidden": 1}}, "losses.hidden compares layer by layer"),
    ],
)
def test_keys_that_say_nothing_or_nonsense(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StepSlice.model_validate({"distil": {"minutes": 1, **asked}})


def test_what_a_model_cannot_give() -> None:
    step = StepSlice.model_validate({"distil": {"minutes": 1, "exits": [2, 6], "exit": 2}})
    with pytest.raises(SpecError, match=r"0\.distil\.exits: got 6; expected fewer than the 6 layers"):
        check([step], WIDTHS, 1)
    fit = StepSlice.model_validate({"distil": {"minutes": 1, "exits": [2, 5], "exit": 5}})
    assert len(check([fit], WIDTHS, 1).layers) == 5
    for task in ("classification", "generation"):
        with pytest.raises(SpecError, match=f"got a model for {task}; expected embedding"):
            check([fit], WIDTHS, 1, teacher=Teacher(WIDTHS, task))
