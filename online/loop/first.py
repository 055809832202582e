"""The first version: the spec's own checkpoint, with a memory of what it can do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.spec import DeploymentSpec
from builders.store.atomic import atomic_directory
from builders.training.arithmetic import reproducible
from builders.training.recipe import TrainingRecipe
from online.learner.importance import importance_of, save_importance
from online.learner.memory import FOLDER, Memory, Reservoir, save_memory
from online.learner.weights import WEIGHTS
from online.loop.gathered import require_enough, split_rows
from online.loop.settings import noun_of, online_of, recipe_of
from online.tasks.opening import open_task
from online.tasks.task import LearningTask
from runtime.errors import InputError

_DOMAIN = "first"


def original(spec: DeploymentSpec) -> Checkpoint:
    """What the spec names. Raises InputError for one that an update cannot write again."""
    checkpoint = load_checkpoint(spec.model)
    if checkpoint.adapter is not None or not (checkpoint.directory / WEIGHTS).is_file():
        raise InputError(
            f"model {spec.model.source}",
            got="a LoRA beside its weights" if checkpoint.adapter is not None else f"no {WEIGHTS}",
            expected=f"all weights in one {WEIGHTS}: an update writes them again",
            fix="save it merged, and in one file",
        )
    return checkpoint


def adopt(spec: DeploymentSpec, out: Path) -> tuple[Checkpoint, LearningTask]:
    """A copy of the spec's checkpoint in `out`, with its memory; nothing happens where it is there already.

    A memory that lies beside the checkpoint is taken over. Raises InputError for too little to hold some out.
    """
    checkpoint = original(spec)
    task = open_task(spec.model, checkpoint, online_of(spec).learner.window)
    if out.is_dir():
        return checkpoint, task
    with atomic_directory(out) as work:
        for record in checkpoint.files:
            target = work / record.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / record.name, target)
        if (checkpoint.directory / FOLDER).is_dir():
            shutil.copytree(checkpoint.directory / FOLDER, work / FOLDER)
        else:
            _remember(spec, task, work)
    return checkpoint, task


def _remember(spec: DeploymentSpec, task: LearningTask, work: Path) -> None:
    """Of Python's own text the share that is held out is that of our small model's training, so that a model that
    learnt it is judged by what it has not seen."""
    online = online_of(spec)
    file = online.old_texts or (spec.precision.calibration_texts if spec.generates else None)
    documents, what = task.past(file)
    share = TrainingRecipe().held_out_share if file is None and spec.generates else online.learner.held_out_share
    learnt, held_out = split_rows(documents, share, task)
    require_enough(learnt, held_out, online.learner.rows, what, noun_of(spec))
    kept, recipe = Reservoir.empty(task.width), recipe_of(spec)
    if recipe.keep_old:
        kept = kept.offered(learnt, np.random.default_rng(recipe.seed))
    save_memory(Memory(kept).with_domain(_DOMAIN, held_out), work)
    if recipe.ewc:
        with reproducible(recipe.seed):
            save_importance(importance_of(task, task.load(work), learnt, recipe), work)
