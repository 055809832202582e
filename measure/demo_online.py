"""`make demo-online`: a language model that learnt Python's documentation meets text of another kind.

The loop goes from feedback to a promoted version, on a server whose users ask it all the time; beside it the same
update as one would naively make it; then candidates that must not pass: the gate, the proof and the canary each stop
one. The model is a quarter of that of `make demo-generate`, trained by the same code, once: so that all of it is done
in minutes on a CPU without bf16 too.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from builders import pipeline
from builders.__main__ import run
from builders.checkpoint import load_checkpoint
from builders.commands import show
from builders.spec import DeploymentSpec, load_spec
from builders.store.processor import this_processor
from builders.training.progress import training_progress
from builders.training.recipe import TrainingRecipe
from measure.live import USERS, Live, served
from measure.other_text import other_documents
from measure.small_model.folder import train_small_model
from online.feedback.store import KeptTraffic
from online.gate.verdict import GateBudget, GateVerdict
from online.learner.recipe import UpdateRecipe
from online.learner.update import update_version
from online.loop.building import PipelineBuilds
from online.loop.feedback_files import add_lines
from online.loop.journal import LoopJournal
from online.loop.learning import judge_update
from online.loop.opening import feedback_store, serving
from online.loop.records import UpdateStage
from online.loop.settings import budget_of, online_of, policy_of, recipe_of
from online.loop.steps import Loop
from online.loop.timeline import timeline_page
from online.rollout.drive import Journal, Rollout, begin
from online.rollout.state import Phase
from online.tasks.opening import open_task
from online.tasks.task import Rows
from runtime.settings import ServerSettings

NAME = "pydoc-online"
_LONGEST_TEXT = 16_000  # characters of one sample; the store takes 64 KiB
_RECIPE = TrainingRecipe(
    vocabulary=2048, hidden=128, layers=4, heads=4, kv_heads=2, ffn=384, context=256, steps=400
)  # fmt: skip
# Wide margins: evidence for narrow ones takes thousands of requests, which two users do not make in minutes.
_CANARY = {
    "shares": [0.2, 0.5], "margin_errors": 0.2, "margin_slow": 0.3, "slow_ms": 1500.0, "mirrored_requests": 30,
    "step_requests": 20, "soak_requests": 60, "most_minutes": 10.0,
}  # fmt: skip
_AIM_NEW, _AIM_OLD = -0.7, 0.03
_LATE_S = 2.0
_LOOK_S = 0.2
_LOOKS = 5000  # at the loop or a rollout, at most


def main() -> None:
    parser = argparse.ArgumentParser(description="online learning of a small language model, on real text")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    arguments = parser.parse_args()
    started = time.monotonic()
    build_dir: Path = arguments.build_dir
    spec_file = _prepare(build_dir)
    spec = load_spec(spec_file)
    with LoopJournal(build_dir, NAME) as journal, served(spec_file, NAME, build_dir) as live:
        champion, rows = _learn(spec, build_dir, journal, live)
        _beside(spec, journal, champion, rows)
        _shuffled(spec, journal, champion, rows)
        _never_promoted(spec, build_dir, journal, live)
        state = journal.load()
        assert state is not None
        journal.page.write_text(timeline_page(NAME, state, journal.ended()))
        print(f"\n{journal.page}; `trireme online status {spec_file}` shows it as a table")
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{time.monotonic() - started:.0f} s in all, {spent:.0f} s of CPU, on {this_processor().name}")


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
        closing(feedback_store(load_spec(spec_file), build_dir, KeptTraffic(share=1.0))) as store,
        feedback.open("rb") as found,
    ):
        added = add_lines(store, found, NAME, 1, "generation")
    print(f"   trireme online feedback add {feedback}: {added.new} new, {len(added.refused)} refused", flush=True)
    return spec_file


def _spec(folder: Path) -> dict[str, Any]:
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    return {
        "name": NAME,
        "model": {"source": str(folder.resolve()), "task": "generation", "max_length": longest},
        "precision": {"cpu": "w8", "max_perplexity_ratio": 1.05},
        "online": {
            "when": {"samples": 100},
            # Muon, by which the model was trained. Chosen by rows of the feedback that were not held out, and by the
            # half of the old hold-out that judges no update: AdamW forgets more at the rate that learns as much.
            "learner": {
                "optimiser": "muon", "learning_rate": 0.003, "steps": 240, "rows": 24, "replay_share": round(1 / 3, 3),
            },
            "gate": {"min_gain": 0.3},  # words alone, in whatever order, are worth a few per cent
            "canary": _CANARY,
        },
    }  # fmt: skip


def _learn(spec: DeploymentSpec, build_dir: Path, journal: LoopJournal, live: Live) -> tuple[Path, tuple[Rows, Rows]]:
    """The loop, from feedback to a promoted version. Returns what it began from, and the update's rows."""
    print(
        f"\n3. trireme online run: feedback -> update -> gate -> build -> canary, while {USERS} of Locust's users ask",
        flush=True,
    )
    rows = None
    beside = serving(spec, build_dir, live.gateway, live.grpc, live.secret, journal.server_settings)
    with show.build_progress(quiet=False) as report:
        builds = PipelineBuilds(spec, build_dir, report)
        loop = Loop(spec, journal, builds, lambda: feedback_store(spec, build_dir), beside)
        for _ in range(_LOOKS):
            step = loop.step()
            if step.said:
                print(f"   {step.said}", flush=True)
            state = journal.load()
            if rows is None and state is not None and state.update is not None:
                rows = journal.rows(state.update.number)
            if step.waits or step.ended is not None:
                break
            time.sleep(_LOOK_S if step.looks else 0.0)
        loop.close()
    (record,) = journal.ended()
    assert rows is not None
    _print_update("online learning", record.verdict, record.report.step.share if record.report else 0.0)
    print(f"   answers: {live.said}; {live.failed} failed", flush=True)
    _require(record.stage is UpdateStage.PROMOTED, f"the update {record.stage}: {record.reason}")
    _require(live.failed == 0, f"{live.failed} requests failed")
    _print_aim(record.verdict)
    return journal.checkpoint(0), rows


def _beside(spec: DeploymentSpec, journal: LoopJournal, champion: Path, rows: tuple[Rows, Rows]) -> None:
    print("\n4. the same steps on the same rows, naively: nothing replayed, all of it taken", flush=True)
    naive = recipe_of(spec).model_copy(update={"replay_share": 0.0})
    verdict, share = _tried(spec, journal, "naive", champion, rows, naive, math.inf)
    _print_update("naive", verdict, share)
    _require(not verdict.passed, "the naive update passes the gate: it shows nothing")


def _shuffled(spec: DeploymentSpec, journal: LoopJournal, champion: Path, rows: tuple[Rows, Rows]) -> None:
    print("\n5. an update whose training text was shuffled word by word, as by a fault of whoever feeds it", flush=True)
    learnt, held_out = rows
    shuffled = np.random.default_rng(0).permuted(learnt, axis=1)
    budget = online_of(spec).gate.max_forgetting
    recipe = recipe_of(spec)
    verdict, share = _tried(spec, journal, "shuffled", champion, (shuffled, held_out), recipe, budget)
    _print_update("shuffled", verdict, share)
    _require(not verdict.passed, "shuffled text passes the gate")


def _never_promoted(spec: DeploymentSpec, build_dir: Path, journal: LoopJournal, live: Live) -> None:
    """Versions that nothing has judged, as if somebody had published them by hand."""
    state = journal.load()
    assert state is not None
    champion = state.champion
    repository = pipeline.repository_path(build_dir, spec, "cpu")
    known: dict[int, ServerSettings] = {}
    beside = serving(
        spec, build_dir, live.gateway, live.grpc, live.secret,
        lambda version: known.get(version) or journal.server_settings(version),
    )  # fmt: skip
    number = state.highest
    for title, harm in (("whose weights are damaged", _damaged), ("that is slow", _slow)):
        print(f"\n{6 if harm is _damaged else 7}. a version {title}, rolled out all the same", flush=True)
        number += 1
        with show.build_progress(quiet=True) as report:
            builds = PipelineBuilds(spec, build_dir, report)
            built = builds.build(journal.folder / "tried" / "naive", [champion.version], number)
        known[built.version] = ServerSettings.model_validate_json(built.settings)
        harm(repository / NAME / str(built.version))
        before = live.failed
        with Journal(journal.folder / f"by-hand-{built.version}.json") as file:
            begin(file, policy_of(online_of(spec).canary), champion.version, built.version)
            rollout = Rollout(file, beside.door, beside.versions)
            for _ in range(_LOOKS):
                found = rollout.step()
                if rollout.ended:
                    break
                time.sleep(_LOOK_S)
        builds.make_current(champion.settings)
        print(f"   {found.phase}: {found.decisions[-1].reason}", flush=True)
        print(f"   answers: {live.said}; {live.failed} failed", flush=True)
        _require(found.phase is Phase.ROLLED_BACK, f"the version {title} is {found.phase}")
        _require(live.failed == before, f"{live.failed - before} requests failed")


def _damaged(folder: Path) -> None:
    """The largest weights are zeros: the graph loads and runs as before."""
    import onnx

    file = folder / "graph.onnx"
    model = onnx.load(file)
    largest = max(model.graph.initializer, key=lambda weights: len(weights.raw_data))
    largest.raw_data = bytes(len(largest.raw_data))
    file.unlink()  # it may be a link into the store
    onnx.save(model, file)


def _slow(folder: Path) -> None:
    """Right, and late: a step on the way that waits."""
    file = folder / "model.py"
    text = file.read_text()
    head = next(line for line in text.splitlines() if line.lstrip().startswith("def execute("))
    file.unlink()
    file.write_text(text.replace(head, f"{head}\n        time.sleep({_LATE_S})", 1))


def _tried(
    spec: DeploymentSpec, journal: LoopJournal, name: str, champion: Path, rows: tuple[Rows, Rows],
    recipe: UpdateRecipe, most: float,
) -> tuple[GateVerdict, float]:  # fmt: skip
    """An update outside of the loop, judged as the loop judges."""
    out = journal.folder / "tried" / name
    online = online_of(spec)
    task = open_task(spec.model, load_checkpoint(spec.model), online.learner.window)
    report = update_version(task, champion, name, *rows, out, recipe, budget=GateBudget(max_forgetting=most))
    verdict = judge_update(task, champion, name, rows[1], out, budget_of(online.gate))
    return verdict, report.step.share


def _print_aim(verdict: GateVerdict | None) -> None:
    """On every machine's text; it is no check, as text of another kind, where there are no man pages, has an end of its
    own."""
    assert verdict is not None
    assert verdict.new is not None
    worst = max(one.change for one in verdict.old)
    met = verdict.new.change <= _AIM_NEW and worst <= _AIM_OLD
    print(
        f"   aim: new text {_AIM_NEW:+.0%} or lower at old text {_AIM_OLD:+.0%} or lower: {'met' if met else 'missed'}"
    )


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
