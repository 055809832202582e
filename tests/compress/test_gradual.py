"""Zeros that grow in number under training: their schedule, which weights they take, a kill, refusals."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from builders.checkpoint import load_checkpoint
from builders.compress.distil import distil
from builders.compress.gradual import at_once, rising, zeros_at
from builders.compress.inputs import matrices_of
from builders.compress.plan import check
from builders.compress.texts import CalibrationText
from builders.errors import SpecError
from builders.export.encoder import write_graph
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder
from builders.pipeline.compress import carried_out
from builders.pipeline.result import Build
from builders.spec import GradualSlice, PrecisionSlice, StepSlice
from builders.store.store import Store
from builders.training.loop import TrainingWork
from builders.training.recipe import TrainingProgress
from tests.compress.killed import assert_same_weights, resumed_and_whole
from tests.compress.test_distil import TRAINED, _teaching, texts  # noqa: F401
from tests.compress.test_spec import WIDTHS
from tests.compress.tiny import Tiny, compressing

HALF = GradualSlice(amount=0.5, every=2, until=0.5)


def _zeros(module: Any) -> set[int]:
    """Of each row."""
    return set((module.weight == 0).sum(1).tolist())


def test_the_share_rises_as_a_cubic() -> None:
    asked = GradualSlice(amount=0.8, until=0.5)
    found = [zeros_at(asked, share) for share in (0, 0.125, 0.25, 0.5, 0.9)]
    assert found == pytest.approx([0, 0.8 * (1 - 0.75**3), 0.8 * 0.875, 0.8, 0.8])


class _Two(torch.nn.Module):
    """Four weights in a layer, as `matrices_of` finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.product = torch.nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.product.weight.copy_(torch.tensor([[4.0, 3, 2, 1]]))


def test_a_weight_may_return_until_the_last_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop trains, and writes into the model at each step, is by hand here."""
    monkeypatch.setattr("builders.compress.gradual.matrices_of", lambda model: {"product": model.product})
    model, dense = _Two(), torch.tensor([[4.0, 3, 2, 1]])
    seen: list[list[float]] = []

    def loss(_: int) -> torch.Tensor:
        seen.append(model.product.weight[0].tolist())
        return model.product.weight.sum()

    work = TrainingWork(model, loss, range(9), int, lambda: float((model.product.weight == 0).sum()))

    def step(done: float, number: int, weights: list[float], following: Any) -> Any:
        with torch.no_grad():
            model.product.weight.copy_(torch.tensor([weights]))
        model.product.weight.grad = None
        following[0].loss(number).backward()
        following[1](TrainingProgress(number + 1, 8, 0.0, None, done))
        return model.product.weight.grad[0]  # type: ignore[index]

    with rising(model, HALF, work, lambda progress: None) as given:
        assert step(0.25, 0, dense[0].tolist(), given).tolist() == [1] * 4
        step(0.25, 1, [4, 3, 2, 1], given)  # between two choices
        gradient = step(0.25, 2, [4, 3, 2, 1], given)  # 0.4375 of four
        assert seen == [[4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 0, 0]]
        assert gradient.tolist() == [1] * 4
        with torch.no_grad():
            model.product.weight.copy_(torch.tensor([[1.0, 3, 5, 2]]))
        assert given[0].judge is not None
        assert given[0].judge() == 2.0
        assert model.product.weight[0].tolist() == [1, 3, 5, 2]  # the next choice is among all of them
        step(0.5, 3, [1, 3, 5, 2], given)
        gradient = step(0.6, 4, [1, 3, 5, 2], given)  # the last choice
        assert seen[-2:] == [[1, 3, 0, 0], [0, 3, 5, 0]]
        assert gradient.tolist() == [0, 1, 1, 0]
        step(0.9, 6, [9, 3, 5, 9], given)
        assert seen[-1] == [0, 3, 5, 0]
        with torch.no_grad():
            model.product.weight.copy_(torch.tensor([[9.0, 3, 5, 9]]))
    assert model.product.weight[0].tolist() == [0, 3, 5, 0]
    assert not list(model.buffers())


def test_at_once_is_for_a_while(tiny_bert: Path) -> None:
    model = Tiny.of(tiny_bert).model
    before = copy.deepcopy(model.state_dict())
    with at_once(model, HALF):
        for module in matrices_of(model).values():
            assert _zeros(module) == {module.weight.shape[1] // 2}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_result_has_its_zeros_and_so_has_the_graph(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:  # noqa: F811
    """An average of weights is the result, and zeros stay zeros in it."""
    step: dict[str, object] = {"distil": {**TRAINED, "ema": 0.9, "sparsity": {"amount": 0.75}}}
    spec = compressing(tiny_bert, [step], precision={"calibration_texts": str(texts), "calibration_samples": 16})
    built = Build(spec, "cpu", load_checkpoint(spec.model))
    made = carried_out(built, Store(tmp_path / "store"), lambda stage, message: None).checkpoint
    note = "; ".join(json.loads(made.path("compression.json").read_text())[-1]["notes"])
    assert "75.0% of the layers' weights are 0" in note
    before, _, after = note.partition("cosine mean ")[2].partition(", worst")[0].split()
    assert float(before) < float(after)  # than as many zeros at once
    matrices = matrices_of(load_encoder(made))
    for module in matrices.values():
        assert _zeros(module) == {module.weight.shape[1] * 3 // 4}
    file = tmp_path / "g.onnx"
    write_graph(load_encoder(made), head_modules(made), made, "fp32", file)
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    sparse = [array for array in arrays if array.ndim == 2 and (array == 0).mean() == 0.75]
    assert sum(array.size for array in sparse) == sum(module.weight.numel() for module in matrices.values())


def _distilled(folder: Path, source: Path, texts: Path, **more: Any) -> Tiny:  # noqa: F811
    tiny = Tiny.of(source)
    asked = StepSlice.model_validate({"distil": {**TRAINED, "sparsity": {"amount": 0.5, "every": 4}}}).distil
    assert asked is not None
    teaching = _teaching(folder, tiny, **more)
    budget = PrecisionSlice(calibration_texts=texts, calibration_samples=16)
    distil(asked, tiny.model, tiny.forward_of, tiny.checkpoint, CalibrationText(tiny.checkpoint, budget), teaching)
    return tiny


def _kill_between_choices(progress: TrainingProgress) -> None:
    if progress.share > 0.4 and progress.step % 4 == 2:
        signal.raise_signal(signal.SIGKILL)


def test_after_a_kill_it_comes_to_the_same_weights(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:  # noqa: F811
    resumed, whole = resumed_and_whole(_distilled, _kill_between_choices, (tiny_bert, texts), tmp_path, 0.3)
    assert_same_weights(resumed.model, whole.model)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "Field required"),
        ({"amount": 0}, "greater than 0"),
        ({"amount": 1}, "less than 1"),
        ({"amount": 0.5, "every": 0}, "greater than 0"),
        ({"amount": 0.5, "until": 1}, "less than or equal to 0.95"),
        ({"amount": 0.5, "schedule": "linear"}, "Extra inputs"),
    ],
)
def test_schedules_that_make_no_sense(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StepSlice.model_validate({"distil": {"minutes": 1, "sparsity": asked}})


@pytest.mark.parametrize("first", [{"sparsify": {}}, {"distil": {"minutes": 1, "sparsity": {"amount": 0.5}}}])
def test_training_behind_zeros_would_fill_them(first: dict[str, Any]) -> None:
    steps = [StepSlice.model_validate(step) for step in (first, {"distil": {"minutes": 1}})]
    with pytest.raises(SpecError, match=r"compress\.1\.distil: got a step before it that makes zeros"):
        check(steps, WIDTHS, 1)
    check(steps[:1], WIDTHS, 1)
