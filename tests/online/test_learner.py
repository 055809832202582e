"""An update learns the new, keeps the old as far as it is told to, and survives its own death."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from builders.digests import file_digest
from builders.errors import DivergedError
from builders.training.optimiser import Optimiser
from builders.training.recipe import TrainingProgress
from online.gate.forgetting import Change, change_of, elsewhere
from online.gate.verdict import GateBudget, GateRefusal, GateVerdict, judge_candidate
from online.learner.batches import batches_of, update_batches
from online.learner.blend import PartialStep, TriedShare, blend, largest_step
from online.learner.memory import FOLDER, Memory, Reservoir, load_memory
from online.learner.recipe import UpdateRecipe
from online.learner.update import UpdateReport, update_version
from online.tasks.language import load_language_model, row_losses
from online.tasks.task import Scores, Training
from runtime.errors import InputError
from tests.online.small import LANGUAGE, WINDOW, save_small, speech

pytestmark = pytest.mark.usefixtures("one_thread")

NEW, HELD_OUT = speech(2, 400, 10), speech(2, 160, 11)
RECIPE = UpdateRecipe(steps=40, rows=16, learning_rate=0.01)
LOOSE = GateBudget(max_forgetting=10.0)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("versions") / "1")


def update(version: Path, out: Path, recipe: UpdateRecipe = RECIPE, most: float = 10.0) -> UpdateReport:
    return update_version(LANGUAGE, version, "two", NEW, HELD_OUT, out, recipe, budget=GateBudget(max_forgetting=most))


def judged(version: Path, candidate: Path, most: float = 0.03) -> GateVerdict:
    held_out = dict(load_memory(version).held_out)
    return judge_candidate(LANGUAGE, version, candidate, ("two", HELD_OUT), held_out, GateBudget(max_forgetting=most))


@pytest.fixture(scope="module")
def naive(version: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole update, with nothing against forgetting."""
    out = tmp_path_factory.mktemp("naive") / "2"
    update(version, out, RECIPE.model_copy(update={"replay_share": 0.0}))
    return out


def test_a_naive_update_learns_and_forgets_and_is_refused(version: Path, naive: Path) -> None:
    verdict = judged(version, naive)
    assert verdict.new is not None
    assert verdict.new.high < -0.5
    assert verdict.old[0].low > 0.2
    assert [item.name for item in verdict.objections] == [GateRefusal.FORGETTING]


@pytest.mark.parametrize("against", [{"replay_share": 0.5}, {"kl": 1.0}])
def test_each_way_against_forgetting_forgets_less(
    version: Path, naive: Path, tmp_path: Path, against: dict[str, float]
) -> None:
    update(version, tmp_path / "2", RECIPE.model_copy(update=against))
    kept, lost = judged(version, tmp_path / "2"), judged(version, naive)
    assert kept.old[0].after < lost.old[0].after * 0.9
    assert kept.new is not None
    assert kept.new.high < -0.3


@pytest.mark.parametrize("kind", [Optimiser(kind="sgd"), Optimiser(kind="sgd", momentum=0.0)])
def test_other_optimisers_learn_too(version: Path, tmp_path: Path, kind: Optimiser) -> None:
    update(version, tmp_path / "2", RECIPE.model_copy(update={"optimiser": kind, "learning_rate": 0.3}))
    verdict = judged(version, tmp_path / "2", most=100)
    assert verdict.passed, verdict


def test_low_rank_matrices_learn_and_are_merged(version: Path, tmp_path: Path) -> None:
    """Each matrix of the layers moves by a product of so many rows, nothing else does, and the folder is as ever; a
    killed one comes to the same."""

    class Killed(BaseException):
        pass

    def die(progress: TrainingProgress) -> None:
        if progress.step == 25:
            raise Killed

    recipe = RECIPE.model_copy(update={"lora_rank": 3, "learning_rate": 0.02})
    with pytest.raises(Killed):
        update_version(
            LANGUAGE, version, "two", NEW, HELD_OUT, tmp_path / "2", recipe, budget=LOOSE, report=die,
            checkpoint_every_s=0.0,
        )  # fmt: skip
    update(version, tmp_path / "2", recipe)
    update(version, tmp_path / "again", recipe)
    assert len({file_digest(tmp_path / name / "model.safetensors") for name in ("2", "again")}) == 1
    verdict = judged(version, tmp_path / "2")
    assert verdict.new is not None
    assert verdict.new.high < -0.1
    before, after = (load_file(folder / "model.safetensors") for folder in (version, tmp_path / "2"))
    assert before.keys() == after.keys()
    for name, value in after.items():
        moved = value - before[name]
        if name.endswith("_proj.weight"):
            assert 1 <= np.linalg.matrix_rank(moved, tol=1e-4) <= 3
        else:
            assert not moved.any(), name


def test_a_part_of_the_way_holds_the_budget_and_passes_the_gate(version: Path, tmp_path: Path) -> None:
    """And the next domain is judged against both before it."""
    found = update(version, tmp_path / "2", most=0.05)
    assert 0 < found.step.share < 1
    assert found.step.monotone
    verdict = judged(version, tmp_path / "2", most=0.05)  # by rows that the step was not chosen by
    assert verdict.passed, verdict
    memory = load_memory(tmp_path / "2")
    assert list(memory.held_out) == ["one", "two"]
    assert memory.reservoir.seen == 700
    third = speech(3, 300, 20), speech(3, 160, 21)
    update_version(LANGUAGE, tmp_path / "2", "three", *third, tmp_path / "3", RECIPE, budget=LOOSE)
    last = judge_candidate(LANGUAGE, tmp_path / "2", tmp_path / "3", ("three", third[1]), memory.held_out, GateBudget())
    assert {item.domain for item in last.old} == {"one", "two"}
    assert load_memory(tmp_path / "3").reservoir.seen == 1000


def test_a_step_that_is_chosen_passes_before_other_rows_nearly_always() -> None:
    """Of updates that forget more with each row of losses drawn anew; the step's own bound passes half of the time."""
    random, budget = np.random.default_rng(0), GateBudget(max_forgetting=0.03, max_fall=0.05)

    def seen(share: float, losses: NDArray[np.float64], right: NDArray[np.float64]) -> Change:
        before = Scores(np.zeros(len(losses)), {"accuracy": np.ones(len(right))}, guarded=("accuracy",))
        return change_of("one", before, Scores(share * losses, {"accuracy": 1 - share * right}))

    passed = {"elsewhere": 0, "here": 0}
    for _ in range(300):
        rows = [(random.normal(0.3, 0.5, 100), random.uniform(0, 1, 100)) for _ in range(2)]
        for name in passed:

            def tried_at(share: float, name: str = name, rows: Any = rows) -> TriedShare:
                found = seen(share, *rows[0])
                high, fall = elsewhere(found) if name == "elsewhere" else (found.high, found.fall)
                return TriedShare(share=share, bound=high, fall=fall)

            step = largest_step(tried_at, lambda tried: budget.holds(tried.bound, tried.fall))
            judged_by = seen(step.share, *rows[1])
            passed[name] += budget.holds(judged_by.high, judged_by.fall)
    assert passed["here"] < 200
    assert passed["elsewhere"] >= 280


def test_nothing_may_be_forgotten_means_nothing_is_learnt_and_the_gate_says_so(version: Path, tmp_path: Path) -> None:
    found = update(version, tmp_path / "2", RECIPE.model_copy(update={"replay_share": 0.0}), most=0.0)
    assert found.step.share == 0
    assert file_digest(tmp_path / "2" / "model.safetensors") == file_digest(version / "model.safetensors")
    assert [item.name for item in judged(version, tmp_path / "2").objections] == [GateRefusal.NO_GAIN]


def test_shuffled_rows_do_not_pass(version: Path, tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permuted(NEW, axis=1)
    update_version(LANGUAGE, version, "two", shuffled, HELD_OUT, tmp_path / "2", RECIPE, budget=LOOSE)
    names = {item.name for item in judged(version, tmp_path / "2").objections}
    assert GateRefusal.NO_GAIN in names or GateRefusal.FORGETTING in names


def test_a_killed_update_comes_to_the_same_weights(version: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(progress: TrainingProgress) -> None:
        if progress.step == 25:
            raise Killed

    for _ in range(2):  # from step 24 both times: the checkpoint is as old as that
        with pytest.raises(Killed):
            update_version(
                LANGUAGE, version, "two", NEW, HELD_OUT, tmp_path / "2", RECIPE, report=die, checkpoint_every_s=0.0
            )
        assert [file.name for file in tmp_path.iterdir()] == [".2.update"]
    seen: list[int] = []
    update_version(
        LANGUAGE, version, "two", NEW, HELD_OUT, tmp_path / "2", RECIPE, budget=LOOSE,
        report=lambda progress: seen.append(progress.step), checkpoint_every_s=0.0,
    )  # fmt: skip
    assert seen == list(range(25, 41))
    assert [file.name for file in tmp_path.iterdir()] == ["2"]
    update(version, tmp_path / "again")
    assert len({file_digest(tmp_path / name / "model.safetensors") for name in ("2", "again")}) == 1


def test_another_updates_checkpoint_is_refused(version: Path, tmp_path: Path) -> None:
    (tmp_path / ".2.update").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="training state"):
        update(version, tmp_path / "2")
    assert not (tmp_path / "2").exists()


def test_an_update_that_diverges_leaves_nothing(version: Path, tmp_path: Path) -> None:
    wild = RECIPE.model_copy(update={"optimiser": Optimiser(kind="sgd"), "learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(DivergedError):
        update(version, tmp_path / "2", wild)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("rows", "held_out", "domain", "says"),
    [
        (NEW[:, :-1], HELD_OUT, "two", "rows new"),
        (NEW, HELD_OUT + 300, "two", "below 257"),
        (NEW.astype(np.int32), HELD_OUT, "two", "int32"),
        (NEW[:0], HELD_OUT, "two", "rows new"),
        (NEW, HELD_OUT, "one", "already"),
        (NEW, HELD_OUT, "../two", "domain"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    version: Path, tmp_path: Path, rows: np.ndarray, held_out: np.ndarray, domain: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        update_version(LANGUAGE, version, domain, rows, held_out, tmp_path / "2", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_a_pull_to_a_past_that_was_not_kept_is_refused(version: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(version, bare)
    np.save(bare / FOLDER / "reservoir.npy", np.zeros((0, WINDOW + 1), np.int64))
    with pytest.raises(InputError, match=r"recipe\.kl"):
        update(bare, tmp_path / "2", RECIPE.model_copy(update={"kl": 1.0}))
    assert update(bare, tmp_path / "2").replayed_rows == 0  # all rows are new then
    shutil.rmtree(bare / FOLDER)
    with pytest.raises(InputError, match="memory of"):
        update(bare, tmp_path / "3")


def _other(version: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(version, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def test_a_candidate_of_another_architecture_is_refused_by_name(version: Path, tmp_path: Path) -> None:
    others = [_other(version, tmp_path / "config", rope_theta=1.0), _other(version, tmp_path / "shape")]
    tensors = load_file(others[1] / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:16]
    save_file(tensors, others[1] / "model.safetensors")
    others.append(_other(version, tmp_path / "words"))
    (others[2] / "tokenizer.json").write_text("{}")
    for folder, says in zip(
        others, ("rope_theta", r"model\.norm\.weight is \[16\], was \[32\]", "other text"), strict=True
    ):
        verdict = judged(version, folder)
        assert [item.name for item in verdict.objections] == [GateRefusal.ARCHITECTURE]
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(verdict.objections[0].why)
    with pytest.raises(InputError, match=r"config\.json"):
        judged(version, tmp_path)


def test_a_candidate_that_gives_no_numbers_is_refused(version: Path, tmp_path: Path) -> None:
    folder = _other(version, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: np.full_like(value, np.nan) for name, value in tensors.items()}, folder / "model.safetensors")
    assert [item.name for item in judged(version, folder).objections] == [GateRefusal.NOT_FINITE]


def test_a_small_hold_out_bounds_nothing() -> None:
    with pytest.raises(InputError, match="29 rows"):
        change_of("x", Scores(np.zeros(29)), Scores(np.zeros(29)))


def test_bounds_are_of_paired_rows() -> None:
    """Rows differ by far more than the models do; each against itself, the change is exact."""
    before = np.linspace(1, 9, 100)
    found = change_of("x", Scores(before), Scores(before + 0.01))
    assert (found.change, found.low, found.high) == pytest.approx((np.exp(0.01) - 1,) * 3)
    noisy = change_of("x", Scores(before), Scores(before + np.tile([0.11, -0.09], 50)))
    assert noisy.low < 0 < noisy.change < noisy.high


def stepped(bound_at: Callable[[float], float], most: float = 1.0) -> PartialStep:
    return largest_step(lambda share: TriedShare(share=share, bound=bound_at(share)), lambda tried: tried.bound <= most)


@given(st.floats(0.001, 1.2), st.floats(0.3, 3))
def test_bisection_finds_the_edge_of_a_monotone_curve(edge: float, power: float) -> None:
    found = stepped(lambda share: (share / edge) ** power)
    assert found.monotone
    assert found.share <= min(edge, 1) <= found.share + 1 / 64 + 1e-9
    assert len(found.tried) <= 8


def test_a_curve_with_a_hump_is_said_not_to_be_monotone() -> None:
    found = stepped(lambda share: 2.0 if 0.4 < share < 0.8 else 0.5 if share < 1 else 1.5)
    assert not found.monotone
    assert {item.share: item.bound for item in found.tried}[found.share] <= 1  # it holds all the same


def test_bounds_that_are_no_numbers_hold_nothing() -> None:
    assert stepped(lambda share: float("nan")).share == 0


def test_a_blend_lies_on_the_line(version: Path, naive: Path) -> None:
    old, new = (load_language_model(folder).state_dict() for folder in (version, naive))
    for share in (0.0, 0.3, 1.0):
        for name, value in blend(old, new, share).items():
            np.testing.assert_allclose(value, (1 - share) * old[name] + share * new[name], atol=1e-6)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 5))
def test_a_reservoir_holds_no_more_than_it_may(capacity: int, rows: int, seed: int) -> None:
    offered = np.arange(rows * 3).reshape(rows, 3)
    found = Reservoir.empty(3, capacity).offered(offered, np.random.default_rng(seed))
    assert len(found.rows) == min(capacity, rows)
    assert found.seen == rows
    assert len({tuple(row) for row in found.rows} & {tuple(row) for row in offered}) == len(found.rows)


def test_a_reservoir_keeps_early_and_late_rows_alike() -> None:
    """In two goes, as two versions would: each row is kept with the same chance."""
    kept = np.zeros(100)
    for seed in range(600):
        random = np.random.default_rng(seed)
        half = Reservoir.empty(1, 10).offered(np.arange(50)[:, None], random)
        kept[half.offered(np.arange(50, 100)[:, None], random).rows[:, 0]] += 1
    assert kept.sum() == 6000
    assert abs(kept[:50].sum() - 3000) < 200
    assert kept.min() > 25


def test_batches_hold_the_asked_share_of_the_past() -> None:
    batches = list(update_batches(NEW, speech(1, 50, 0) * 0, UpdateRecipe(steps=3, rows=8, replay_share=0.5)))
    assert [(batch[-4:] == 0).all() and (batch[:4] > 0).all() for batch in batches] == [True] * 3
    seen = [next(source) for source in [batches_of(NEW[:5], 3, np.random.default_rng(0))] for _ in range(5)]
    assert {tuple(row) for batch in seen for row in batch} == {tuple(row) for row in NEW[:5]}


def test_the_pull_is_zero_at_the_previous_version_and_grows_from_it(version: Path, naive: Path) -> None:
    previous, model = load_language_model(version), load_language_model(version)
    rows = load_memory(version).reservoir.rows[:8]
    for weights, is_same in ((version, True), (naive, False)):
        model.load_state_dict(load_language_model(weights).state_dict())
        cross_entropy = float(row_losses(model, rows).mean())
        plain, pulled = (LANGUAGE.loss(Training(model, previous, 4, pull, 1.0)) for pull in (0.0, 1.0))
        assert plain(rows).item() == pytest.approx(cross_entropy, rel=1e-4)
        extra = pulled(rows).item() - cross_entropy
        assert (abs(extra) < 1e-4) == is_same
        assert extra > -1e-4


def test_a_memory_is_read_as_it_was_written(version: Path) -> None:
    memory = load_memory(version)
    assert np.array_equal(memory.held_out["one"], speech(1, 160, 3))
    with pytest.raises(InputError, match="already"):
        Memory(memory.reservoir, memory.held_out).with_domain("one", NEW)
