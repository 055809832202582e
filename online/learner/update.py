"""A version and new rows -> a candidate's folder, which appears whole or not at all; a killed update goes on."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builders.digests import file_digest
from builders.store.atomic import atomic_directory
from builders.training import loop
from builders.training.arithmetic import arithmetic, reproducible
from builders.training.optimiser import rise_and_fall
from builders.training.recipe import LossPoint, TrainingProgress
from builders.training.resume import Resume
from builders.training.text import TokenIds
from online.gate.forgetting import change_of, halves, row_losses
from online.gate.verdict import load_model
from online.learner.blend import PartialStep, blend, largest_step
from online.learner.memory import FOLDER, Memory, load_memory, save_memory
from online.learner.objective import update_batches, update_loss
from online.learner.recipe import UpdateRecipe
from runtime.errors import InputError
from runtime.record import Record

REPORT = f"{FOLDER}/update.json"  # beside the memory: no setting of the model, of which its digest is made


class UpdateReport(Record):
    """Saved with the memory in the candidate's folder. `step`: how much of the update was taken."""

    recipe: UpdateRecipe
    max_forgetting: float
    domain: str
    new_rows: int
    replayed_rows: int  # of each batch
    previous_sha256: str
    curve: tuple[LossPoint, ...]
    step: PartialStep
    cpu_s: float


def update_version(
    version: Path,
    domain: str,
    rows: TokenIds,
    held_out: TokenIds,
    out: Path,
    recipe: UpdateRecipe | None = None,
    *,
    max_forgetting: float = 0.03,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    checkpoint_every_s: float = 60.0,
) -> UpdateReport:
    """Trains a copy of `version` on `rows` [rows, window + 1] and on its own reservoir, goes back towards it as far as
    `max_forgetting` of the old domains wants, and writes the new folder `out` with a memory of all of it.

    The first half of each hold-out chooses how far; the second is left to the gate. Killed, and called again with the
    same arguments, it goes on from its checkpoint, a file beside `out`. Raises InputError for what does not fit,
    DivergedError from the training; `out` is then not there.
    """
    recipe = recipe or UpdateRecipe()
    memory = load_memory(version)
    after = memory.with_domain(domain, held_out)  # refused before anything is trained
    model = load_model(version)
    _require_rows(model, memory, {"new": rows, "held out": held_out}, out)
    _require_past(memory, recipe)
    digest = file_digest(version / "model.safetensors")
    key = _key(digest, domain, rows, memory, recipe)
    resume = Resume(out.with_name(f".{out.name}.update"), key, checkpoint_every_s)
    with reproducible(recipe.seed):
        previous = copy.deepcopy(model).eval()
        trained = _train(model, previous, rows, memory, recipe, report, resume)
    step = _step_back(model, previous, memory, max_forgetting)
    grown = memory.reservoir.offered(rows, np.random.default_rng([recipe.seed, 2]))
    found = UpdateReport(
        recipe=recipe,
        max_forgetting=max_forgetting,
        domain=domain,
        new_rows=len(rows),
        replayed_rows=recipe.replayed(len(memory.reservoir.rows)),
        previous_sha256=digest,
        curve=trained.curve,
        step=step,
        cpu_s=round(trained.cpu_s, 1),
    )
    with atomic_directory(out) as work:
        _write(model.eval(), version, work, Memory(grown, after.held_out))
        (work / REPORT).write_text(found.model_dump_json(indent=2) + "\n")
    resume.drop()
    return found


def _train(
    model: Any,
    previous: Any,
    rows: TokenIds,
    memory: Memory,
    recipe: UpdateRecipe,
    report: Callable[[TrainingProgress], None],
    resume: Resume,
) -> loop.Trained:
    replay = memory.reservoir.rows
    model.train()
    work = loop.TrainingWork(
        model,
        update_loss(model, previous, recipe.replayed(len(replay)), recipe),
        update_batches(rows, replay, recipe),
        lambda batch: batch.shape[0] * (batch.shape[1] - 1),
    )
    settings = loop.TrainingSettings(
        loop.Bounds(steps=recipe.steps),
        rise_and_fall(recipe.learning_rate, recipe.rise),
        recipe.optimiser,
        arithmetic=arithmetic(),
        clip=recipe.clip,
    )
    return loop.train(work, settings, report, resume)


def _step_back(model: Any, previous: Any, memory: Memory, most: float) -> PartialStep:
    """Leaves in `model` the weights of the largest step that every old domain bears."""
    old, new = previous.state_dict(), copy.deepcopy(model.state_dict())
    chosen_by = {name: halves(rows)[0] for name, rows in memory.held_out.items()}
    before = {name: row_losses(previous, rows) for name, rows in chosen_by.items()}

    def bound_at(share: float) -> float:
        model.load_state_dict(blend(old, new, share))
        changes = [change_of(name, before[name], row_losses(model, rows)) for name, rows in chosen_by.items()]
        return max(item.high for item in changes)

    step = largest_step(bound_at, most)
    model.load_state_dict(blend(old, new, step.share))
    return step


def _write(model: Any, version: Path, work: Path, memory: Memory) -> None:
    """The previous folder with other weights: tokenizer and configuration are the version's own files."""
    for file in version.iterdir():
        if file.is_dir() and file.name != FOLDER:
            shutil.copytree(file, work / file.name)  # such as additional chat templates
        elif file.is_file() and file.name != "model.safetensors" and not file.name.startswith("training."):
            shutil.copy2(file, work / file.name)
    _save_weights(model, version / "model.safetensors", work / "model.safetensors")
    save_memory(memory, work)


def _save_weights(model: Any, like: Path, file: Path) -> None:
    """The tensors that the previous file has, in its types; matrices that are one stay one."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    state = model.state_dict()
    with safe_open(like, "pt") as before:
        tensors = {name: state[name].to(before.get_tensor(name).dtype).contiguous() for name in before.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata={"format": "pt"})


def _key(previous: str, domain: str, rows: TokenIds, memory: Memory, recipe: UpdateRecipe) -> str:
    """All that the training depends on. How far back it goes is decided after it. `previous`: the weights' digest."""
    parts = [previous, domain, recipe.model_dump_json(), arithmetic()]
    kept = memory.reservoir.rows.tobytes()
    return hashlib.sha256("|".join(parts).encode() + rows.tobytes() + kept).hexdigest()


def _require_rows(model: Any, memory: Memory, given: Mapping[str, TokenIds], out: Path) -> None:
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
    width, vocabulary = memory.reservoir.rows.shape[1], model.config.vocab_size
    for name, rows in given.items():
        fits = rows.ndim == 2 and rows.dtype == np.int64 and len(rows) and rows.shape[1] == width
        if not fits or rows.min() < 0 or rows.max() >= vocabulary:
            raise InputError(
                f"rows {name}",
                got=f"{rows.dtype} {list(rows.shape)}",
                expected=f"int64 [rows, {width}] of ids below {vocabulary}, as the version's own",
                fix="cut the text by the version's tokenizer and window",
            )


def _require_past(memory: Memory, recipe: UpdateRecipe) -> None:
    if recipe.kl and not len(memory.reservoir.rows):
        raise InputError(
            "recipe.kl",
            got="a version without a reservoir",
            expected="rows of its past: the pull is measured on them",
            fix="offer rows to its reservoir, or leave it at 0",
        )
