"""Elastic weight consolidation: weights that matter to the past are held, and no row of the past is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from builders.digests import file_digest
from builders.spec import FederatedSlice, LearnerSlice
from builders.training.recipe import TrainingProgress
from online.gate.verdict import judge_candidate
from online.learner.importance import FILE, held, importance_of
from online.learner.memory import FOLDER, Memory, Reservoir, load_memory, save_memory
from online.learner.recipe import UpdateRecipe
from online.learner.update import update_version
from online.loop.first import adopt
from online.loop.settings import plan_of, recipe_of
from online.tasks.language import load_language_model
from online.tasks.task import LearningTask, Rows
from runtime.errors import InputError
from tests.conftest import save_tiny
from tests.online import encoders
from tests.online.encoders import LOOSE
from tests.online.loop_world import loop_spec
from tests.online.small import LANGUAGE, save_small, speech

pytestmark = pytest.mark.usefixtures("one_thread")

NAIVE = UpdateRecipe(steps=25, rows=16, learning_rate=0.01, replay_share=0.0)
BARE = NAIVE.model_copy(update={"ewc": 100.0, "keep_old": False})
NEW, HELD_OUT = speech(2, 400, 10), speech(2, 160, 11)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("versions") / "1")


def without_rows(version: Path, out: Path, task: LearningTask, recipe: UpdateRecipe) -> Path:
    """It keeps what its weights matter to, and none of what it learnt."""
    from safetensors.torch import save_file

    memory = load_memory(version)
    shutil.copytree(version, out, ignore=shutil.ignore_patterns(FOLDER))
    save_memory(Memory(Reservoir.empty(task.width), memory.held_out), out)
    save_file(importance_of(task, task.load(version), memory.reservoir.rows, recipe), out / FILE)
    return out


def lost(task: LearningTask, version: Path, candidate: Path, held_out: Rows) -> tuple[float, float]:
    """Change of the new domain, and of the old one."""
    verdict = judge_candidate(task, version, candidate, ("two", held_out), dict(load_memory(version).held_out), LOOSE)
    assert verdict.new is not None
    return verdict.new.change, verdict.old[0].change


def test_importance_is_the_mean_squared_gradient_of_a_token(version: Path) -> None:
    """Against each row's gradient, computed by itself."""
    import torch

    model, rows = load_language_model(version), speech(1, 12, 7)
    found = importance_of(LANGUAGE, model, rows, NAIVE)
    names, weights = zip(*model.named_parameters(), strict=True)
    assert set(found) == set(names)
    total = [torch.zeros_like(weight) for weight in weights]
    for row in torch.from_numpy(rows):
        words = model(input_ids=row[None, :-1]).logits.log_softmax(-1)[0]
        said = -words[torch.arange(len(row) - 1), row[1:]].sum() / (len(row) - 1) ** 0.5
        for place, gradient in enumerate(torch.autograd.grad(said, weights)):
            total[place] += gradient**2 / len(rows)
    for name, expected in zip(names, total, strict=True):
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)


def test_what_is_added_is_half_the_squared_distance_by_importance(version: Path) -> None:
    import torch

    model, rows = load_language_model(version), speech(1, 12, 7)
    importance = importance_of(LANGUAGE, model, rows, NAIVE)
    loss = held(lambda batch: torch.zeros(()), model, importance, 3.0)
    assert loss(rows).item() == 0
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1
    expected = 0.5 * 3.0 * 0.01 * sum(value.sum().item() for value in importance.values())
    assert loss(rows).item() == pytest.approx(expected, rel=1e-3)


def test_a_version_that_keeps_no_rows_forgets_less_and_passes_the_guard_on(version: Path, tmp_path: Path) -> None:
    bare = without_rows(version, tmp_path / "1", LANGUAGE, BARE)
    for name, recipe in (("naive", NAIVE), ("2", BARE)):
        update_version(LANGUAGE, bare, "two", NEW, HELD_OUT, tmp_path / name, recipe, budget=LOOSE)
    free, kept = (lost(LANGUAGE, bare, tmp_path / name, HELD_OUT) for name in ("naive", "2"))
    assert kept[1] < 0.5 * free[1]
    assert kept[0] < -0.3
    memory = load_memory(tmp_path / "2")
    assert (len(memory.reservoir.rows), list(memory.held_out)) == (0, ["one", "two"])
    assert not (tmp_path / "naive" / FILE).exists()
    before, after = load_file(bare / FILE), load_file(tmp_path / "2" / FILE)
    own = importance_of(LANGUAGE, load_language_model(tmp_path / "2"), NEW, BARE)
    for name, value in after.items():
        np.testing.assert_allclose(value, before[name] + own[name], rtol=1e-3, atol=1e-8)
    third = speech(3, 300, 20), speech(3, 160, 21)
    update_version(LANGUAGE, tmp_path / "2", "three", *third, tmp_path / "3", BARE, budget=LOOSE)
    assert load_memory(tmp_path / "3").held_out.keys() == {"one", "two", "three"}


def test_a_killed_update_that_is_held_comes_to_the_same_weights(version: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(progress: TrainingProgress) -> None:
        if progress.step == 6:
            raise Killed

    recipe = NAIVE.model_copy(update={"ewc": 1.0, "steps": 10})  # by rows that the version keeps
    args: Any = (LANGUAGE, version, "two", NEW, HELD_OUT)
    with pytest.raises(Killed):
        update_version(*args, tmp_path / "2", recipe, budget=LOOSE, report=die, checkpoint_every_s=0.0)
    update_version(*args, tmp_path / "2", recipe, budget=LOOSE)
    update_version(*args, tmp_path / "again", recipe, budget=LOOSE)
    for file in ("model.safetensors", FILE):
        assert len({file_digest(tmp_path / name / file) for name in ("2", "again")}) == 1
    assert load_memory(tmp_path / "2").reservoir.seen == 700


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedding", "classification"])
def test_encoders_are_held_by_the_same_guard(kind: str, tmp_path: Path) -> None:
    first = encoders.save_first(tmp_path / "first", kind)
    task = encoders.opened(first, kind)
    made: Any = encoders.pairs if kind == "embedding" else encoders.labels
    more = {} if kind == "embedding" else {"wrong": True}
    learnt, held_out = (
        encoders.rows_of(task, made("close", count, seed, **more)) for count, seed in ((120, 3), (60, 4))
    )
    naive = encoders.RECIPE.model_copy(update={"replay_share": 0.0})
    guarded = naive.model_copy(update={"ewc": 100.0, "keep_old": False})
    bare = without_rows(first, tmp_path / "1", task, guarded)
    for name, recipe in (("naive", naive), ("2", guarded)):
        update_version(task, bare, "two", learnt, held_out, tmp_path / name, recipe, budget=LOOSE)
    free, kept = (lost(task, bare, tmp_path / name, held_out) for name in ("naive", "2"))
    assert kept[1] < free[1] - 0.05
    assert kept[0] < 0


def test_what_cannot_be_held_is_refused(version: Path, tmp_path: Path) -> None:
    bare = without_rows(version, tmp_path / "1", LANGUAGE, BARE)
    args: Any = ("two", NEW, HELD_OUT, tmp_path / "2")
    with pytest.raises(InputError, match="lora_rank=2"):
        update_version(LANGUAGE, bare, *args, BARE.model_copy(update={"lora_rank": 2}))
    good = load_file(bare / FILE)
    for harm, says in (
        (lambda: save_file({**good, "more": good["model.norm.weight"].clone()}, bare / FILE), "other weights"),
        (lambda: (bare / FILE).write_bytes(b"nothing"), "SafetensorError"),
        (lambda: (bare / FILE).unlink(), "neither"),
    ):
        harm()
        with pytest.raises(InputError, match=says):
            update_version(LANGUAGE, bare, *args, BARE)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("learner", "says"),
    [
        ({"ewc": -1}, "greater than or equal to 0"),
        ({"ewc": float("inf")}, "finite"),
        ({"ewc": float("nan")}, "finite|greater"),
        ({"ewc": 1, "lora_rank": 4}, "does not move"),
        ({"keep_old": False}, r"replay_share=0\.5"),
        ({"keep_old": False, "replay_share": 0, "kl": 1}, "kl=1"),
    ],
)
def test_a_spec_that_asks_for_what_is_not_held_is_refused(learner: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        LearnerSlice.model_validate(learner)


def test_the_spec_says_it_and_federated_rounds_refuse_it(tmp_path: Path) -> None:
    """The first version is adopted without a row of its past, but for those that judge."""
    old = tmp_path / "old.tsv"
    old.write_text("".join(f"{one['query']}\t{one['positive']}\n" for one in encoders.pairs("open", 400, 1)))
    learner = {"ewc": 2.5, "keep_old": False, "replay_share": 0}
    spec = loop_spec(save_tiny(tmp_path / "model", "bert"), "embedding", learner=learner, old_texts=str(old))
    assert (recipe_of(spec).ewc, recipe_of(spec).keep_old) == (2.5, False)
    adopt(spec, tmp_path / "1")
    assert len(load_memory(tmp_path / "1").reservoir.rows) == 0
    assert any(value.any() for value in load_file(tmp_path / "1" / FILE).values())
    assert spec.online is not None
    with pytest.raises(InputError, match=r"online\.learner\.ewc"):
        plan_of(FederatedSlice(rounds=2), spec.online.learner)
