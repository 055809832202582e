"""`compress`: each step makes a checkpoint of the one before, and what is left is judged against the original.

Every later stage takes the last checkpoint for the model: `precision` has a budget of its own, against its fp32 graph.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from builders.artifacts import Checkpoint
from builders.checkpoint import widths as manifest
from builders.checkpoint.source import locate
from builders.checkpoint.weights import weight_files
from builders.compress import plan
from builders.compress.distil import PAGE, distil
from builders.compress.distil_language import distil_language
from builders.compress.distil_plan import Teacher
from builders.compress.exits import distil_exits
from builders.compress.narrow import BACK
from builders.compress.saving import LOG, save
from builders.compress.step import carry_out, described
from builders.compress.texts import CalibrationText
from builders.errors import QualityError
from builders.judging import corpus
from builders.pipeline import judged_language, teaching
from builders.pipeline.judged import at_fault, judge, missed
from builders.pipeline.opened import opened, pooled
from builders.pipeline.result import Build, Report, done
from builders.spec import DeploymentSpec, StepSlice
from builders.store.store import Store
from builders.training.arithmetic import arithmetic


def compress(built: Build, store: Store, report: Report) -> Build:
    """All steps, within the spec's budget. Raises QualityError that names the step at fault, with its figures."""
    if not built.spec.compress:
        return built
    found = carried_out(built, store, report)
    if built.spec.generates:
        return _language(found, store, report)
    last = judge(found, found.checkpoint, store, report)
    if missed(last, built.spec.compress_budget, built.spec.cpu_executor):
        every = [judge(found, checkpoint, store, report) for checkpoint in found.steps]
        raise QualityError(at_fault(built.spec, every))
    assert last.quality is not None
    report("compress", f"{last.quality.summary}, {last.speeds[built.spec.cpu_executor]:.2f} x as fast")
    return found


def _language(found: Build, store: Store, report: Report) -> Build:
    spec = found.spec
    last = judged_language.judge_step(found, found.checkpoint, store, report)
    if judged_language.missed_by_language(last, spec.compress_budget):
        every = [judged_language.judge_step(found, checkpoint, store, report) for checkpoint in found.steps]
        raise QualityError(judged_language.language_at_fault(spec, every))
    report("compress", last.summary)
    return found


def carried_out(built: Build, store: Store, report: Report) -> Build:
    """The checkpoint after each step, judged by nobody yet."""
    original = built.checkpoint
    teacher = Teacher(widths_of(original), original.task)
    plan.check(built.spec.compress, teacher.widths, built.spec.parallel.tensor, teacher=teacher)
    steps: list[Checkpoint] = []
    for number, step in enumerate(built.spec.compress):
        before = steps[-1] if steps else original
        plan.check([step], widths_of(before), built.spec.parallel.tensor, number, teacher)
        steps.append(_one(replace(built, original=original), before, number, step, store, report))
    return replace(built, original=original, steps=tuple(steps), checkpoint=steps[-1])


def widths_of(checkpoint: Checkpoint) -> manifest.Widths:
    config = json.loads(checkpoint.path("config.json").read_text())
    found = manifest.read_widths(checkpoint.directory, config, weight_files(checkpoint.directory, allow_pickle=True))
    return found or manifest.widths_of_config(config, checkpoint.directory)


def planned(spec: DeploymentSpec, config: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Sizes of a layer where config.json does not tell them: it has a width manifest beside it, or `compress` prunes.
    By the names of `planning.transformer.Model`; of layers that differ, the average. And the steps of `compress` that
    these sizes do not tell of."""
    folder = locate(spec.model, ["config.json", manifest.FILE])
    coded = (folder / manifest.FILE).is_file()
    if not coded and not spec.compress:
        return {}, []
    found = manifest.read_widths(folder, config, weight_files(folder, allow_pickle=True)) if coded else None
    whole = found or manifest.widths_of_config(config, folder)
    teacher = Teacher(whole, spec.model.task)
    widths = plan.check(spec.compress, whole, spec.parallel.tensor, teacher=teacher)
    heads, ffn = (
        max(multiple, sum(plan.counts(widths, what)) // len(widths.layers) // multiple * multiple)
        for what, multiple in plan.multiples(spec.parallel.tensor, widths.group).items()
    )
    shared = heads // widths.group
    sizes = {"layers": len(widths.layers), "heads": heads, "kv_heads": shared, "head_dim": widths.head_size, "ffn": ffn}
    sizes["hidden"] = widths.hidden
    thin = ["low_rank"] if any(layer.ranks for layer in whole.layers) else []
    return sizes, [*thin, *(step.name for step in spec.compress if step.prune is None and step.distil is None)]


def _one(
    built: Build, checkpoint: Checkpoint, number: int, step: StepSlice, store: Store, report: Report
) -> Checkpoint:  # fmt: skip
    spec = built.spec
    inputs = {
        "checkpoint": checkpoint.model_dump(mode="json", exclude={"source"}),
        "step": step.model_dump(mode="json", exclude={"prune": {"labels"}, "distil": {"labels"}}),
        "labels": None if step.labels is None else corpus.corpus_key(step.labels),
        "tensor": spec.parallel.tensor,
        "texts": corpus.corpus_key(spec.precision.calibration_texts),
        "left out": spec.precision.calibration_samples,
    }
    if step.distil is not None:
        assert built.original is not None
        teacher = built.original
        inputs |= teaching.inputs(teacher, spec.precision, arithmetic())

    def run(out: Path) -> Checkpoint:
        model, as_forward = opened(checkpoint)
        texts = CalibrationText(checkpoint, spec.precision)
        if step.distil is None:
            notes = carry_out(step, model, as_forward, checkpoint, texts, spec.parallel.tensor)
            return save(model, checkpoint, spec.model, step, notes, out)
        before = manifest.widths_of_model(model)
        line = teaching.lines(report, "compress", f"step {number}: distil")
        code = distil_exits if step.distil.exits else distil if checkpoint.generation is None else distil_language
        with teaching.teaching(teacher, step.distil, inputs, store, line, "distil", code) as lesson:
            if step.distil.exits:
                notes = distil_exits(step.distil, model, (as_forward, pooled(checkpoint)), checkpoint, texts, lesson)
            elif checkpoint.generation is None:
                notes = distil(step.distil, model, as_forward, checkpoint, texts, lesson)
            else:
                notes = distil_language(step.distil, model, checkpoint, texts, lesson)
            notes.insert(0, described(before, manifest.widths_of_model(model)))
            return save(model, checkpoint, spec.model, step, notes, out, [lesson.scratch / PAGE], lesson.scratch / BACK)

    report("compress", f"step {number}: {step.name}")
    item, hit = store.get_or_build("compress", inputs, Checkpoint, run)
    report("compress", done(f"step {number}: {step.name}: {'; '.join(notes_of(item))}", hit))
    return item.model_copy(update={"source": f"{checkpoint.source} after {step.name}"})


def notes_of(checkpoint: Checkpoint) -> list[str]:
    """What the last step had to say."""
    found: list[str] = json.loads(checkpoint.path(LOG).read_text())[-1]["notes"]
    return found
