"""A version and new rows -> a candidate's folder, which appears whole or not at all; a killed update goes on."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.digests import file_digest
from builders.store.atomic import atomic_directory
from builders.training import loop
from builders.training.arithmetic import arithmetic, reproducible
from builders.training.optimiser import rise_and_fall
from builders.training.recipe import LossPoint, TrainingProgress
from builders.training.resume import Resume
from online.gate.forgetting import change_of, elsewhere, halves
from online.gate.verdict import GateBudget
from online.learner.batches import update_batches
from online.learner.blend import PartialStep, TriedShare, blend, largest_step
from online.learner.importance import FILE as IMPORTANCE
from online.learner.importance import Importance, added, held, importance_of, known_importance, save_importance
from online.learner.low_rank import low_rank
from online.learner.memory import FOLDER, Memory, Reservoir, load_memory, save_memory
from online.learner.recipe import UpdateRecipe
from online.learner.weights import WEIGHTS, require_writable, save_weights
from online.tasks.task import LearningTask, Rows, Training
from runtime.errors import InputError
from runtime.record import Record

if TYPE_CHECKING:
    import torch

REPORT = f"{FOLDER}/update.json"  # beside the memory: no setting of the model, of which its digest is made


class UpdateReport(Record):
    """Saved with the memory in the candidate's folder. `step`: how much of the update was taken."""

    recipe: UpdateRecipe
    max_forgetting: float
    max_fall: float = 1.0
    domain: str
    new_rows: int
    replayed_rows: int  # of each batch
    previous_sha256: str
    curve: tuple[LossPoint, ...]
    step: PartialStep
    cpu_s: float


def update_version(
    task: LearningTask,
    version: Path,
    domain: str,
    rows: Rows,
    held_out: Rows,
    out: Path,
    recipe: UpdateRecipe | None = None,
    *,
    budget: GateBudget | None = None,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    checkpoint_every_s: float = 60.0,
) -> UpdateReport:
    """Trains a copy of `version` on `rows` [rows, width] and on its own reservoir, goes back towards it as far as
    `budget` wants for the old domains, and writes the new folder `out` with a memory of all of it.

    The first half of each hold-out chooses how far; the second is left to the gate. Killed, and called again with the
    same arguments, it goes on from its checkpoint, a file beside `out`. Raises InputError for what does not fit,
    DivergedError from the training; `out` is then not there.
    """
    recipe, budget = recipe or UpdateRecipe(), budget or GateBudget()
    memory = load_memory(version)
    after = memory.with_domain(domain, held_out)  # refused before anything is trained
    _require_rows(task, memory, {"new": rows, "held out": held_out}, out)
    _require_past(memory, recipe)
    _require_one_guard(recipe)
    model = task.load(version)
    require_writable(model, version)
    digest = file_digest(version / WEIGHTS)
    guard = _guard(task, version, model, memory, recipe)
    key = _key(digest, domain, rows, memory, recipe, version)
    resume = Resume(out.with_name(f".{out.name}.update"), key, checkpoint_every_s)
    with reproducible(recipe.seed):
        previous = copy.deepcopy(model).eval()
        with low_rank(model, recipe.lora_rank):
            trained = _train(task, (model, previous), (rows, memory.reservoir.rows), recipe, report, resume, guard)
    step = step_back(task, model, previous, memory, budget)
    grown = Reservoir.empty(task.width)
    if recipe.keep_old:
        grown = memory.reservoir.offered(rows, np.random.default_rng([recipe.seed, 2]))
    if guard is not None:
        with reproducible(recipe.seed):
            guard = added(guard, importance_of(task, model, rows, recipe))
    found = UpdateReport(
        recipe=recipe,
        max_forgetting=budget.max_forgetting,
        max_fall=budget.max_fall,
        domain=domain,
        new_rows=len(rows),
        replayed_rows=recipe.replayed(len(memory.reservoir.rows)),
        previous_sha256=digest,
        curve=trained.curve,
        step=step,
        cpu_s=round(trained.cpu_s, 1),
    )
    with atomic_directory(out) as work:
        write_version(model.eval(), version, work, Memory(grown, after.held_out))
        if guard is not None:
            save_importance(guard, work)
        (work / REPORT).write_text(found.model_dump_json(indent=2) + "\n")
    resume.drop()
    return found


def _train(
    task: LearningTask,
    models: tuple[Any, Any],
    rows: tuple[Rows, Rows],
    recipe: UpdateRecipe,
    report: Callable[[TrainingProgress], None],
    resume: Resume,
    guard: Importance | None,
) -> loop.Trained:
    """`models`: the one that is trained, and the previous one; `rows`: new ones, and those that are replayed."""
    loss = task.loss(Training(*models, recipe.replayed(len(rows[1])), recipe.kl, recipe.temperature))
    if guard is not None:
        loss = held(loss, models[0], guard, recipe.ewc)
    work = loop.TrainingWork(models[0], loss, update_batches(*rows, recipe), task.tokens)
    settings = loop.TrainingSettings(
        loop.Bounds(steps=recipe.steps),
        rise_and_fall(recipe.learning_rate, recipe.rise),
        recipe.optimiser,
        # A distance is no number in bf16: what a few steps move is below its last bit.
        arithmetic=arithmetic() if guard is None else "float32",
        clip=recipe.clip,
    )
    return loop.train(work, settings, report, resume)


def step_back(task: LearningTask, model: Any, previous: Any, memory: Memory, budget: GateBudget) -> PartialStep:
    """Leaves in `model` the weights of the largest step that every old domain bears, on rows that will not judge it,
    and with room for those that will."""
    old, new = previous.state_dict(), copy.deepcopy(model.state_dict())
    chosen_by = {name: halves(rows)[0] for name, rows in memory.held_out.items()}
    before = {name: task.scores(previous, rows) for name, rows in chosen_by.items()}

    def tried_at(share: float) -> TriedShare:
        model.load_state_dict(blend(old, new, share))
        bounds = [
            elsewhere(change_of(name, before[name], task.scores(model, rows))) for name, rows in chosen_by.items()
        ]
        return TriedShare(share=share, bound=max(high for high, _ in bounds), fall=max(fall for _, fall in bounds))

    step = largest_step(tried_at, lambda tried: budget.holds(tried.bound, tried.fall))
    model.load_state_dict(blend(old, new, step.share))
    return step


def write_version(model: Any, version: Path, work: Path, memory: Memory) -> None:
    """The previous folder with other weights: tokenizer and configuration are the version's own files."""
    for file in version.iterdir():
        if file.is_dir() and file.name != FOLDER:
            shutil.copytree(file, work / file.name)  # such as additional chat templates
        elif file.is_file() and file.name != WEIGHTS and not file.name.startswith("training."):
            shutil.copy2(file, work / file.name)
    save_weights(model, version, work)
    save_memory(memory, work)


def _guard(
    task: LearningTask, version: Path, model: Any, memory: Memory, recipe: UpdateRecipe
) -> dict[str, torch.Tensor] | None:
    if not recipe.ewc:
        return None
    with reproducible(recipe.seed):
        return known_importance(task, version, model, memory.reservoir.rows, recipe)


def _key(previous: str, domain: str, rows: Rows, memory: Memory, recipe: UpdateRecipe, version: Path) -> str:
    """All that the training depends on. How far back it goes is decided after it. `previous`: the weights' digest."""
    parts = [previous, domain, recipe.model_dump_json(), arithmetic()]
    kept = memory.reservoir.rows.tobytes()
    if recipe.ewc and (version / IMPORTANCE).is_file():
        parts.append(file_digest(version / IMPORTANCE))
    return hashlib.sha256("|".join(parts).encode() + rows.tobytes() + kept).hexdigest()


def _require_rows(task: LearningTask, memory: Memory, given: Mapping[str, Rows], out: Path) -> None:
    if out.exists():
        raise InputError(
            f"folder {out}", got="something that is there already", expected="a new folder", fix="name another"
        )
    if not memory.held_out:
        raise InputError(
            "hold-outs of the version",
            got="none",
            expected="one of each domain that it learnt: without them nobody can tell what it forgets",
            fix="save a memory with them beside it",
        )
    width = memory.reservoir.rows.shape[1]
    for name, rows in given.items():
        fits = rows.ndim == 2 and rows.dtype == np.int64 and len(rows) and rows.shape[1] == width == task.width
        fault = task.fault(rows) if fits else f"{rows.dtype} {list(rows.shape)}"
        if fault is not None:
            raise InputError(
                f"rows {name}",
                got=fault,
                expected=f"int64 [rows, {width}] of the model's own, as the version's memory has them",
                fix="make them by the version's tokenizer and window",
            )


def _require_past(memory: Memory, recipe: UpdateRecipe) -> None:
    if recipe.kl and not len(memory.reservoir.rows):
        raise InputError(
            "recipe.kl",
            got="a version without a reservoir",
            expected="rows of its past: the pull is measured on them",
            fix="offer rows to its reservoir, or leave it at 0",
        )


def _require_one_guard(recipe: UpdateRecipe) -> None:
    if recipe.ewc and recipe.lora_rank is not None:
        raise InputError(
            "recipe.ewc", got=f"{recipe.ewc:g} with lora_rank={recipe.lora_rank}",
            expected="one of the two: a weight that does not move is far from nothing", fix="leave one out",
        )  # fmt: skip
