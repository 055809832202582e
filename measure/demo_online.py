"""`make demo-online`: a language model that learnt Python's documentation meets text of another kind.

The loop goes from feedback to a promoted version; beside it the same update as one would naively make it; then
candidates that must not pass. The model is a quarter of that of `make demo-generate`, trained by the same code, once:
so that all of it is done in minutes on a CPU without bf16 too.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from builders.__main__ import run
from builders.commands import show
from builders.spec import DeploymentSpec, load_spec
from builders.store.processor import this_processor
from builders.training.progress import training_progress
from builders.training.recipe import TrainingRecipe
from builders.training.text import TokenIds
from measure.other_text import other_documents
from measure.small_model.folder import train_small_model
from online.feedback.store import FeedbackStore, KeptTraffic
from online.gate.forgetting import halves
from online.gate.verdict import GateVerdict, judge_candidate
from online.learner.memory import load_memory
from online.learner.recipe import UpdateRecipe
from online.learner.update import update_version
from online.loop.building import PipelineBuilds
from online.loop.feedback_files import add_lines
from online.loop.journal import LoopFiles, LoopJournal
from online.loop.records import UpdateStage
from online.loop.settings import budget_of, online_of, recipe_of
from online.loop.steps import Loop
from online.loop.timeline import timeline_page

NAME = "pydoc-online"
_LONGEST_TEXT = 16_000  # characters of one sample; the store takes 64 KiB
_RECIPE = TrainingRecipe(
    vocabulary=2048, hidden=128, layers=4, heads=4, kv_heads=2, ffn=384, context=256, steps=400
)  # fmt: skip
_STEPS = 100  # of the loop, at most: it takes six


def main() -> None:
    parser = argparse.ArgumentParser(description="online learning of a small language model, on real text")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    arguments = parser.parse_args()
    started = time.monotonic()
    build_dir: Path = arguments.build_dir
    spec_file = _prepare(build_dir)
    spec = load_spec(spec_file)
    with LoopJournal(build_dir, NAME) as journal:
        champion, rows = _learn(spec, build_dir, journal)
        _beside(spec, journal, champion, rows)
        _bad_ones(spec, journal, champion, rows)
        state = journal.load()
        assert state is not None
        journal.page.write_text(timeline_page(NAME, state, journal.ended()))
        print(f"\n{journal.page}; `trireme online status {spec_file}` shows it as a table")
    print(f"{time.monotonic() - started:.0f} s in all on {this_processor().name}")


def _prepare(build_dir: Path) -> Path:
    """Model, spec and feedback."""
    folder = build_dir / "online-model"
    print(f"1. a small language model, trained on Python's own documentation: {folder}", flush=True)
    if (folder / "config.json").is_file():
        print("   it is there already; remove the folder to train again", flush=True)
    else:
        with training_progress() as progress:
            train_small_model(folder, progress, _RECIPE)
    shutil.rmtree(build_dir / NAME, ignore_errors=True)  # of an earlier run: what the pipeline made stays in the store
    spec_file = build_dir / NAME / "spec.yaml"
    spec_file.parent.mkdir(parents=True)
    spec_file.write_text(yaml.safe_dump(_spec(folder), sort_keys=False))
    name, documents = other_documents()
    feedback = build_dir / NAME / "feedback.jsonl"
    lines = [{"kind": "text", "text": document.passages[0][:_LONGEST_TEXT]} for document in documents]
    feedback.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    size = feedback.stat().st_size / 1e6
    print(f"\n2. feedback: {len(documents)} texts of another kind, {name}, {size:.1f} MB", flush=True)
    with (
        closing(_store(load_spec(spec_file), build_dir, KeptTraffic(share=1.0))) as store,
        feedback.open("rb") as found,
    ):
        added = add_lines(store, found, NAME, 1)
    print(f"   trireme online feedback add {feedback}: {added.new} new, {len(added.refused)} refused", flush=True)
    return spec_file


def _spec(folder: Path) -> dict[str, Any]:
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    return {
        "name": NAME,
        "model": {"source": str(folder.resolve()), "task": "generation", "max_length": longest},
        "precision": {"cpu": "w8", "max_perplexity_ratio": 1.05},
        "online": {"when": {"samples": 100}, "learner": {"learning_rate": 0.003, "steps": 240}},
    }


def _store(spec: DeploymentSpec, build_dir: Path, traffic: KeptTraffic | None = None) -> FeedbackStore:
    return FeedbackStore(online_of(spec).feedback or LoopFiles(build_dir, spec.name).feedback_url, traffic=traffic)


def _learn(spec: DeploymentSpec, build_dir: Path, journal: LoopJournal) -> tuple[Path, tuple[TokenIds, TokenIds]]:
    """The loop, from feedback to a promoted version. Returns what it began from, and the update's rows."""
    print(
        "\n3. trireme online run: feedback -> update -> gate -> build -> promoted, as nothing is served here",
        flush=True,
    )
    rows = None
    with show.build_progress(quiet=False) as report:
        builds = PipelineBuilds(spec, build_dir, report)
        loop = Loop(spec, journal, builds, lambda: _store(spec, build_dir), without_canary=True)
        for _ in range(_STEPS):
            step = loop.step()
            print(f"   {step.said}", flush=True)
            state = journal.load()
            if rows is None and state is not None and state.update is not None:
                rows = journal.rows(state.update.number)
            if step.waits or step.ended is not None:
                break
    (record,) = journal.ended()
    assert rows is not None
    _print_update("online learning", record.verdict, record.report.step.share if record.report else 0.0)
    _require(record.stage is UpdateStage.PROMOTED, f"the update {record.stage}: {record.reason}")
    return journal.checkpoint(0), rows


def _beside(spec: DeploymentSpec, journal: LoopJournal, champion: Path, rows: tuple[TokenIds, TokenIds]) -> None:
    print("\n4. the same steps on the same rows, naively: nothing replayed, all of it taken", flush=True)
    learner = online_of(spec).learner
    naive = recipe_of(learner).model_copy(update={"replay_share": 0.0})
    verdict, share = _tried(spec, journal, "naive", champion, rows, naive, math.inf)
    _print_update("naive", verdict, share)
    _require(not verdict.passed, "the naive update passes the gate: it shows nothing")


def _bad_ones(spec: DeploymentSpec, journal: LoopJournal, champion: Path, rows: tuple[TokenIds, TokenIds]) -> None:
    print("\n5. an update whose training text was shuffled word by word, as by a fault of whoever feeds it", flush=True)
    learnt, held_out = rows
    shuffled = np.random.default_rng(0).permuted(learnt, axis=1)
    budget = online_of(spec).gate.max_forgetting
    recipe = recipe_of(online_of(spec).learner)
    verdict, share = _tried(spec, journal, "shuffled", champion, (shuffled, held_out), recipe, budget)
    _print_update("shuffled", verdict, share)
    _require(not verdict.passed, "shuffled text passes the gate")


def _tried(
    spec: DeploymentSpec, journal: LoopJournal, name: str, champion: Path, rows: tuple[TokenIds, TokenIds],
    recipe: UpdateRecipe, most: float,
) -> tuple[GateVerdict, float]:  # fmt: skip
    """An update outside of the loop, judged as the loop judges."""
    out = journal.folder / "tried" / name
    report = update_version(champion, name, *rows, out, recipe, max_forgetting=most)
    old = {domain: halves(kept)[1] for domain, kept in load_memory(champion).held_out.items()}
    verdict = judge_candidate(champion, out, (name, rows[1]), old, budget_of(online_of(spec).gate))
    return verdict, report.step.share


def _print_update(name: str, verdict: GateVerdict | None, share: float) -> None:
    assert verdict is not None
    assert verdict.new is not None
    new = verdict.new
    told = [f"new text {new.before:.1f} -> {new.after:.1f} ({new.change:+.1%})"]
    told += [
        f"earlier text {one.before:.1f} -> {one.after:.1f} ({one.change:+.1%}, at most {one.high:+.1%})"
        for one in verdict.old
    ]
    print(f"   {name}: perplexity of {'; '.join(told)}; {share:.0%} of the update taken", flush=True)
    for objection in verdict.objections:
        print(f"   refused by the gate: {objection.why}", flush=True)


def _require(held: bool, otherwise: str) -> None:
    """A demo that shows something else than it says has failed. Raises CheckError."""
    from builders.errors import CheckError

    if not held:
        raise CheckError(f"demo-online: {otherwise}")


if __name__ == "__main__":
    run(main)
