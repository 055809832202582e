"""Commands of online learning: the loop, where it stands, the way back, and feedback from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, SpecArgument
from builders.errors import InputError, MachineError

if TYPE_CHECKING:
    from builders.spec import DeploymentSpec
    from builders.training.recipe import TrainingProgress
    from online.feedback.store import FeedbackStore, KeptTraffic
    from online.loop.building import Serving
    from online.loop.journal import LoopFiles, LoopJournal
    from online.loop.records import LoopState, UpdateRecord
    from online.loop.steps import Loop

online = typer.Typer(no_args_is_help=True, help="Online learning: from feedback to a promoted version, or back.")
feedback = typer.Typer(no_args_is_help=True, help="Feedback without a gateway: from files, into files, and deleted.")
online.add_typer(feedback, name="feedback")

SpecOption = Annotated[str, typer.Option("--spec", help="spec file: its section online names the store")]
Gateway = Annotated[str | None, typer.Option(help="http://HOST:PORT of the gateway that serves the champion")]
Triton = Annotated[str, typer.Option(help="host:port of its Triton, over gRPC")]
Secret = Annotated[Path | None, typer.Option(help="the control secret file that both were started with")]
DEFAULT_TRITON = "127.0.0.1:8001"


@online.command("run")
def run_loop(
    spec: SpecArgument,
    once: Annotated[bool, typer.Option("--once", help="one update, or none where none is due; then end")] = False,
    max_updates: Annotated[int | None, typer.Option(min=1, help="end after so many")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="end after this time, between two steps")] = None,
    gateway: Gateway = None,
    triton: Triton = DEFAULT_TRITON,
    control_secret_file: Secret = None,
    without_canary: Annotated[
        bool, typer.Option("--without-canary", help="promote what passes the gate and is proven: nothing is served")
    ] = False,
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Feedback -> update -> gate -> build -> canary -> promoted, or back. Killed, and run again, it goes on.

    Exit 1 where the last update was refused or rolled back.
    """
    from builders.commands import show
    from builders.spec import load_spec
    from online.loop.journal import LoopJournal
    from online.loop.run import RunBounds, run

    loaded = load_spec(spec)
    _require_one_way(gateway, without_canary)
    with (
        LoopJournal(build_dir, loaded.name) as journal,
        show.build_progress(quiet=as_json) as report,
    ):
        serving = None if gateway is None else _serving(loaded, build_dir, gateway, triton, control_secret_file)
        loop = open_loop(loaded, build_dir, journal, serving, report, without_canary)
        say = speaker(as_json)
        try:
            found = run(loop, RunBounds(once, max_updates, minutes), say, lambda update: draw_timeline(loaded, journal))
        finally:
            loop.close()
        state = journal.load()
        draw_timeline(loaded, journal)
    if as_json:
        print(json.dumps({"updates": [one.model_dump(mode="json") for one in found], **_aliases(state)}, indent=2))
    if found and found[-1].stage != "promoted":
        raise SystemExit(1)


@online.command("status")
def loop_status(spec: SpecArgument, build_dir: BuildDir = DEFAULT_BUILD, as_json: JsonFlag = False) -> None:
    """Champion, challenger, and every update with its data, losses and decision; draws the timeline, but for --json."""
    from builders.spec import load_spec
    from online.loop.journal import LoopFiles

    loaded = load_spec(spec)
    files = LoopFiles(build_dir, loaded.name)
    state, ended = files.load(), files.ended()
    if as_json:
        updates = [*ended, *([state.update] if state is not None and state.update is not None else [])]
        print(json.dumps({**_aliases(state), "updates": [one.model_dump(mode="json") for one in updates]}, indent=2))
        return
    if state is None:
        print(f"no loop was begun: `trireme online run {spec}`")
        return
    _print_status(state, ended)
    draw_timeline(loaded, files)
    print(files.page)


@online.command("rollback")
def roll_back(
    spec: SpecArgument,
    reason: Annotated[str, typer.Option(help="why; it is kept with the decision")] = "a person's word",
    gateway: Gateway = None,
    triton: Triton = DEFAULT_TRITON,
    control_secret_file: Secret = None,
    build_dir: BuildDir = DEFAULT_BUILD,
) -> None:
    """Takes back the update under way, or the champion: the version before it serves again.

    A loop that runs carries it out; without one, this command does. Without --gateway, a server that runs keeps what
    it has until it is started again.
    """
    from builders.commands import show
    from builders.spec import load_spec
    from online.loop.asked import ask_back
    from online.loop.journal import LoopFiles, LoopJournal

    loaded = load_spec(spec)
    said = ask_back(LoopFiles(build_dir, loaded.name), reason)
    try:
        journal = LoopJournal(build_dir, loaded.name)
    except MachineError:
        print(f"{said}: the loop that runs takes it back at its next step")
        return
    with journal, show.build_progress(quiet=False) as report:
        serving = None if gateway is None else _serving(loaded, build_dir, gateway, triton, control_secret_file)
        loop = open_loop(loaded, build_dir, journal, serving, report)
        try:
            print(loop.step().said)
        finally:
            loop.close()
        draw_timeline(loaded, journal)


@feedback.command("add")
def add_feedback(
    file: Annotated[Path, typer.Argument(help="lines of JSON: texts, corrections, pairs, ratings, labels")],
    spec: SpecOption,
    build_dir: BuildDir = DEFAULT_BUILD,
) -> None:
    """Adds the lines of FILE, texts and all. A line that is not taken, or says nothing to the spec's model, is named by
    its number, and why; exit 2."""
    from builders.spec import load_spec
    from online.feedback.store import KeptTraffic
    from online.loop.feedback_files import add_lines
    from online.loop.journal import LoopFiles
    from online.loop.settings import learnt_task

    loaded = load_spec(spec)
    state = LoopFiles(build_dir, loaded.name).load()
    version = 1 if state is None else state.champion.version
    store = open_store(loaded, build_dir, KeptTraffic(share=1.0))
    try:
        with file.open("rb") as lines:
            added = add_lines(store, lines, loaded.name, version, learnt_task(loaded))
    finally:
        store.close()
    print(f"{added.new} new, {added.known} known already, {len(added.refused)} refused")
    if added.refused:
        shown = [f"line {number}: {why}" for number, why in list(added.refused.items())[:20]]
        raise InputError(
            str(file), got="; ".join(shown), expected="samples as docs/online.md has them",
            fix="mend these lines and add the file again: what was taken is known",
        )  # fmt: skip


@feedback.command("export")
def export_feedback(spec: SpecOption, build_dir: BuildDir = DEFAULT_BUILD) -> None:
    """Every sample as a line of JSON on standard output, oldest first, with its request's texts where they are kept."""
    from builders.spec import load_spec

    store = open_store(load_spec(spec), build_dir)
    try:
        for line in store.export():
            print(line)
    finally:
        store.close()


@feedback.command("delete")
def delete_feedback(
    spec: SpecOption,
    user: Annotated[str, typer.Option(help="whose rows go, and what was said of this user's requests")],
    build_dir: BuildDir = DEFAULT_BUILD,
) -> None:
    """Deletes a user's rows. Versions that learnt from them keep what they learnt, and rows of it in their memory."""
    from builders.spec import load_spec

    store = open_store(load_spec(spec), build_dir)
    try:
        gone = store.forget_user(user)
    finally:
        store.close()
    print(
        f"{gone} rows deleted; versions that learnt from them stay: `trireme online rollback` takes the last one back"
    )


def speaker(quiet: bool) -> Callable[[str], None]:
    return (lambda said: None) if quiet else (lambda said: print(said, flush=True))


def open_loop(
    spec: DeploymentSpec, build_dir: Path, journal: LoopJournal, serving: Serving | None, report: Any,
    without_canary: bool = False,
) -> Loop:  # fmt: skip
    from online.loop.building import PipelineBuilds
    from online.loop.learning import TaskLearning
    from online.loop.settings import online_of
    from online.loop.steps import Loop

    online_of(spec)
    return Loop(
        spec, journal, PipelineBuilds(spec, build_dir, report), lambda: open_store(spec, build_dir), serving,
        without_canary, learning=TaskLearning(_training_lines(report)),
    )  # fmt: skip


def _training_lines(report: Any) -> Callable[[TrainingProgress], None]:
    """The update as one more stage of what is under way: twenty lines of it."""
    from builders.training.progress import losses_text

    shown = -1

    def line(progress: TrainingProgress) -> None:
        nonlocal shown
        if int(progress.share * 20) > shown:
            shown = int(progress.share * 20) if progress.share < 1 else -1  # the next update starts anew
            report("update", f"{progress.share:.0%}, {losses_text(progress)}")

    return line


def open_store(spec: DeploymentSpec, build_dir: Path, traffic: KeptTraffic | None = None) -> FeedbackStore:
    """Raises MachineError where the extra `online` is not installed."""
    from online.loop.opening import feedback_store

    try:
        return feedback_store(spec, build_dir, traffic)
    except ImportError as error:
        raise MachineError(
            "store of feedback", got=str(error), expected="sqlalchemy and alembic", fix="pip install 'trireme[online]'"
        ) from error


def _serving(spec: DeploymentSpec, build_dir: Path, gateway: str, triton: str, secret_file: Path | None) -> Serving:
    from online.loop.journal import LoopFiles
    from online.loop.opening import serving
    from runtime.secrets_file import read_secret

    if secret_file is None:
        raise InputError(
            "--control-secret-file", got="nothing", expected="the file that the server was started with",
            fix="give it: with it versions are loaded, and the traffic is split",
        )  # fmt: skip
    settings_of = LoopFiles(build_dir, spec.name).server_settings
    return serving(spec, build_dir, gateway, triton, read_secret(secret_file), settings_of)


def _require_one_way(gateway: str | None, without_canary: bool) -> None:
    if gateway is not None and without_canary:
        raise InputError(
            "--without-canary", got="a gateway too", expected="one of the two", fix="leave one of the two out"
        )


def draw_timeline(spec: DeploymentSpec, files: LoopFiles) -> None:
    from online.files import replace_file
    from online.loop.timeline import timeline_page

    state = files.load()
    if state is not None:
        replace_file(files.page, timeline_page(spec.name, state, files.ended()).encode())


def _aliases(state: LoopState | None) -> dict[str, Any]:
    if state is None:
        return {"champion": None, "challenger": None}
    return {"champion": state.champion.version, "challenger": state.challenger}


def _print_status(state: LoopState, ended: list[UpdateRecord]) -> None:
    from rich.console import Console
    from rich.table import Table

    from online.loop.timeline import HEADS, row_of

    challenger = f"version {state.challenger}" if state.challenger else "none"
    print(f"champion version {state.champion.version} since {state.champion.since}; challenger {challenger}")
    rows = [*ended, *([state.update] if state.update is not None else [])]
    if not rows:
        return
    console = Console()
    shown = Table()
    for head in HEADS:
        shown.add_column(head)
    for one in rows:
        shown.add_row(*row_of(one))
    Console(width=max(console.width, 150)).print(shown)
