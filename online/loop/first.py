"""The first version: the spec's own checkpoint, with a memory of what it can do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.judging import corpus
from builders.judging.corpus import Document
from builders.spec import DeploymentSpec
from builders.store.atomic import atomic_directory
from builders.training.recipe import TrainingRecipe
from online.learner.memory import FOLDER, Memory, Reservoir, save_memory
from online.loop.settings import online_of
from online.loop.texts import require_enough, split_rows
from runtime.errors import InputError
from runtime.tokenizer_file import open_tokenizer

WEIGHTS = "model.safetensors"
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


def adopt(spec: DeploymentSpec, out: Path) -> Checkpoint:
    """A copy of the spec's checkpoint in `out`, with its memory; nothing happens where it is there already.

    A memory that lies beside the checkpoint is taken over. Raises InputError for text too short to hold some out.
    """
    checkpoint = original(spec)
    if out.is_dir():
        return checkpoint
    with atomic_directory(out) as work:
        for record in checkpoint.files:
            target = work / record.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / record.name, target)
        if (checkpoint.directory / FOLDER).is_dir():
            shutil.copytree(checkpoint.directory / FOLDER, work / FOLDER)
        else:
            save_memory(_memory(spec, checkpoint), work)
    return checkpoint


def end_of_text(checkpoint: Checkpoint) -> int:
    """Raises InputError for a model that knows none: nothing would part one text from the next."""
    facts = checkpoint.generation
    if facts is None or not facts.eos_ids:
        raise InputError(
            f"model {checkpoint.source}", got="no token that ends a text", expected="eos_token_id in config.json",
            fix="name one there",
        )  # fmt: skip
    return facts.eos_ids[0]


def _memory(spec: DeploymentSpec, checkpoint: Checkpoint) -> Memory:
    learner = online_of(spec).learner
    documents, share, what = _old_documents(spec)
    tokenizer = open_tokenizer(checkpoint.path("tokenizer.json"))
    learnt, held_out = split_rows(documents, share, tokenizer, end_of_text(checkpoint), learner.window)
    require_enough(learnt, held_out, learner.rows, what)
    kept = Reservoir.empty(learner.window + 1).offered(learnt, np.random.default_rng(learner.seed))
    return Memory(kept).with_domain(_DOMAIN, held_out)


def _old_documents(spec: DeploymentSpec) -> tuple[Sequence[Document], float, str]:
    """What the first version can do, and how much of it is held out. Of Python's own text the share is that of our
    small model's training, so that a model that learnt it is judged by what it has not seen."""
    online = online_of(spec)
    file = online.old_texts or spec.precision.calibration_texts
    if file is None:
        return corpus.documents(), TrainingRecipe().held_out_share, "text of Python's own"
    lines = [Document(line, (line,)) for line in corpus.texts(file, None)]
    return lines, online.learner.held_out_share, f"old texts in {file}"
