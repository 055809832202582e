"""The one loop: as torch alone would do it, bounded, stopped by a number that is none, resumed after a kill."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from builders.__main__ import run
from builders.errors import DivergedError, InputError
from builders.training.arithmetic import Arithmetic, reproducible
from builders.training.curve import curve, training_page
from builders.training.loop import Bounds, Trained, TrainingSettings, TrainingWork, train
from builders.training.optimiser import Optimiser, rise_and_fall
from builders.training.recipe import LossPoint, TrainingProgress
from builders.training.resume import Resume

Pair = tuple[torch.Tensor, torch.Tensor]


def _model(norm: type[torch.nn.Module] = torch.nn.BatchNorm1d) -> torch.nn.Module:
    torch.manual_seed(0)
    # A table that is not moved by Muon, a dropout that draws random numbers, a running mean that is no parameter.
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 8), torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.GELU(), torch.nn.Flatten(),
        norm(48), torch.nn.Linear(48, 1),
    )  # fmt: skip


def _batches() -> Iterator[Pair]:
    source = torch.Generator().manual_seed(1)
    while True:
        ids = torch.randint(11, (16, 3), generator=source)
        yield ids, ids.sum(1, keepdim=True).float() / 10


def _work(model: torch.nn.Module) -> TrainingWork[Pair]:
    def loss(batch: Pair) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(batch[0]).float(), batch[1])

    return TrainingWork(model, loss, _batches(), lambda batch: batch[0].numel())


def _trained(model: torch.nn.Module, settings: TrainingSettings, resume: Resume | None = None) -> Trained:
    with reproducible(0):
        return train(_work(model), settings, resume=resume)


def _settings(kind: str = "adamw", steps: int = 30, **more: object) -> TrainingSettings:
    asked = Optimiser.model_validate({"kind": kind, "weight_decay": 0.01})
    return TrainingSettings(Bounds(steps=steps), rise_and_fall(0.01), asked, **more)  # type: ignore[arg-type]


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_is_what_torch_alone_does() -> None:
    ours, plain = _model(), _model()
    rate = rise_and_fall(0.01)
    _trained(
        ours, TrainingSettings(Bounds(steps=12), rate, Optimiser(kind="sgd", momentum=0.5, weight_decay=0.01), clip=0.3)
    )
    tables = [plain[0].weight, *(p for p in plain.parameters() if p.ndim == 1)]
    matrices = [plain[1].weight, plain[6].weight]
    reference = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 0.01}, {"params": tables, "weight_decay": 0}], lr=0.1, momentum=0.5
    )
    with reproducible(0):
        for step, (ids, wanted) in enumerate(itertools.islice(_batches(), 12)):
            for group in reference.param_groups:
                group["lr"] = rate(step, step / 12)
            reference.zero_grad()
            torch.nn.functional.mse_loss(plain(ids), wanted).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
            reference.step()
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_the_loss_falls_and_the_model_ends_in_its_own_type(kind: str, arithmetic: Arithmetic) -> None:
    model = _model(torch.nn.LayerNorm)
    found = _trained(model, _settings(kind, 60, arithmetic=arithmetic))
    assert found.curve[-1].train < 0.5 * found.curve[0].train
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (found.steps, found.tokens, len(found.curve)) == (60, 60 * 48, 20)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_what_needs_no_gradient_stays(arithmetic: Arithmetic) -> None:
    """To the last bit, although it was rounded to bf16 meanwhile."""
    model = _model(torch.nn.LayerNorm)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model[0].weight)
    _trained(model, _settings(arithmetic=arithmetic))
    assert torch.equal(before, model[0].weight)


def test_the_average_of_weights_is_the_result() -> None:
    start, last, average = _model(), _model(), _model()
    _trained(last, _settings(steps=8))
    _trained(average, _settings(steps=8, ema=0.5))
    weights, seen = start[6].weight.detach().clone(), _model()
    rows = []
    work = _work(seen)

    def watching(batch: Pair) -> torch.Tensor:
        rows.append(seen[6].weight.detach().clone())
        return work.loss(batch)

    with reproducible(0):
        train(TrainingWork(seen, watching, work.batches, work.size), _settings(steps=8))
    for number, row in enumerate([*rows[1:], seen[6].weight.detach()], 1):
        decay = min(0.5, (1 + number) / (10 + number))
        weights = weights.lerp(row, 1 - decay)
    assert torch.allclose(weights, average[6].weight, atol=1e-6)
    assert _same(seen, last)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e6])
def test_a_number_that_is_none_stops_it_with_the_last_good_weights(broken: float) -> None:
    """Weights that gave a finite loss before are known to be good; those of the step before the fault are not."""
    model, seen = _model(), list[dict[str, torch.Tensor]]()
    work = _work(model)

    def loss(batch: Pair) -> torch.Tensor:
        seen.append(copy.deepcopy(model.state_dict()))
        return work.loss(batch) * (broken if len(seen) == 25 else 1.0)

    settings = TrainingSettings(Bounds(steps=40), rise_and_fall(0.01), ceiling=1e4)
    with pytest.raises(
        DivergedError, match=r"diverged at step 25: loss .* good weights are those of step 22"
    ) as caught:
        train(TrainingWork(model, loss, work.batches, work.size), settings)
    assert caught.value.exit_code == 1
    assert torch.equal(model[6].weight, seen[22]["6.weight"])


def test_a_gradient_that_is_no_number_stops_it() -> None:
    model = _model()
    work = _work(model)

    def loss(batch: Pair) -> torch.Tensor:
        zero = (model[6].weight * 0).sum()
        return work.loss(batch) + (zero.sqrt() * 0 if zero == 0 else zero)  # 0, whose slope is none

    before = copy.deepcopy(model[6].weight)
    with pytest.raises(DivergedError, match="gradient of length nan"):
        train(TrainingWork(model, loss, work.batches, work.size), _settings())
    assert torch.equal(before, model[6].weight)


def test_time_is_a_bound_and_batches_may_end() -> None:
    seen: list[TrainingProgress] = []
    settings = TrainingSettings(Bounds(cpu_s=0.3), rise_and_fall(0.01))
    found = train(_work(_model()), settings, seen.append)
    assert found.cpu_s >= 0.3
    assert seen[-1].share == 1
    assert seen[0].steps is None
    model = _model()
    few = train(
        TrainingWork(model, _work(model).loss, itertools.islice(_batches(), 3), lambda _: 1), _settings(steps=100)
    )
    assert (few.steps, few.curve[-1].step) == (3, 3)


_CHILD = """
import os, signal, sys
from pathlib import Path
from tests.training.test_loop import _model, _settings, _work
from builders.training.arithmetic import reproducible
from builders.training.loop import train
from builders.training.resume import Resume
def report(progress):
    if progress.step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
work = _work(_model())
with reproducible(0):
    train(work, _settings(sys.argv[2], ema=0.9), report, Resume(Path(sys.argv[1]), "key", every_s=0))
"""


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_after_a_kill_it_comes_to_the_same_weights(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "work" / "state"
    done = subprocess.run([sys.executable, "-c", _CHILD, str(file), kind], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in file.parent.iterdir()] == ["state"]
    undisturbed, resumed = _model(), _model()
    whole = _trained(undisturbed, _settings(kind, ema=0.9))
    rest = _trained(resumed, _settings(kind, ema=0.9), Resume(file, "key"))
    assert _same(undisturbed, resumed)
    assert whole.curve == rest.curve


def test_a_state_that_is_not_this_trainings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state"
    _trained(_model(), _settings(), Resume(file, "one", every_s=0))
    with pytest.raises(InputError, match="the state of another training"):
        _trained(_model(), _settings(), Resume(file, "other"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="remove the file"):
        _trained(_model(), _settings(), Resume(file, "one"))


def test_the_rate_rises_and_falls() -> None:
    rate = rise_and_fall(2.0, rise=0.1, end=0.5)
    assert [rate(0, share) for share in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([1.0, 2.0, 1.5, 1.0])
    assert rate(0, 0.0) > 0


@pytest.mark.parametrize("losses", [[0.31, 0.052], [2.0, 2.0], [5.0, 1200.0], [-3.0, 0.0]])
def test_the_curve_of_any_loss_lies_within_its_frame(losses: list[float]) -> None:
    points = [LossPoint(step=n, tokens=100 * n, train=loss, held_out=None) for n, loss in enumerate(losses, 1)]
    drawn = curve(points)
    heights = [float(part.partition('"')[0]) for part in drawn.split('cy="')[1:]]
    assert len(heights) == len(losses)
    assert all(12 - 0.1 <= height <= 300 - 36 + 0.1 for height in heights)
    page = training_page("A <student>", ["3 & 2"], points)
    assert "A &lt;student&gt;" in page
    assert "held out" not in page


def test_threads_of_a_training_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user has not said otherwise; and before torch, which reads it once, is loaded."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    seen: list[str | None] = []
    run(lambda: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    monkeypatch.delenv("OMP_WAIT_POLICY")
    run(lambda: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    assert seen == ["ACTIVE", "PASSIVE"]
    loaded = "import sys, builders.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False, timeout=120).returncode == 0
