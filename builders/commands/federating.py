"""Commands of federated rounds: the coordinator's, and a client's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from builders.commands.online import draw_timeline, open_loop, open_store, speaker
from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, SpecArgument
from builders.errors import InputError

if TYPE_CHECKING:
    from builders.spec import DeploymentSpec
    from online.loop.journal import LoopJournal
    from online.loop.learning import Learning
    from online.loop.steps import Stepped

federate = typer.Typer(
    no_args_is_help=True,
    help="Federated rounds: clients learn on text that stays with them, and what they learnt is joined.",
)

Cert = Annotated[Path, typer.Option(help="this side's certificate with what leads to its root, in PEM")]
Key = Annotated[Path, typer.Option(help="its key, in PEM, without a password")]
Authority = Annotated[Path, typer.Option(help="authority that signed the other side's certificates, in PEM")]
HeldOut = Annotated[
    Path | None, typer.Option(help="UTF-8 file, a text a line: judges the candidate; no client may train on it")
]
Texts = Annotated[
    Path | None, typer.Option(help="UTF-8 file, a text a line, to learn from; default: the spec's feedback")
]


@federate.command("serve")
def serve_rounds(
    spec: SpecArgument,
    tls_cert: Cert,
    tls_key: Key,
    tls_ca: Authority,
    listen: Annotated[str, typer.Option(help="host:port where clients come")] = "127.0.0.1:7443",
    held_out: HeldOut = None,
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Coordinates the rounds of one update, and judges what comes of it at the gate. Killed, and run again, it goes on
    from its last complete round; `trireme online run` then builds the candidate and rolls it out.

    Exit 1 where too few clients answer, or the gate refuses.
    """
    from builders.spec import load_spec
    from online.federated.client import host_and_port
    from online.federated.tls import TlsIdentity
    from online.loop.federating import FederatedLearning, require_language_model
    from online.loop.journal import LoopJournal

    loaded = load_spec(spec)
    require_language_model(loaded)
    host_and_port(listen, "--listen")
    identity = TlsIdentity(tls_cert, tls_key, tls_ca)
    identity.parts()  # refused before anything is begun
    with LoopJournal(build_dir, loaded.name) as journal:
        learning = FederatedLearning(listen, identity, speaker(as_json))
        _judged(loaded, journal, spec, build_dir, learning, held_out, as_json)


@federate.command("join")
def join_rounds(
    spec: SpecArgument,
    tls_cert: Cert,
    tls_key: Key,
    tls_ca: Authority,
    coordinator: Annotated[str, typer.Option(help="host:port of `trireme online federate serve`")] = "127.0.0.1:7443",
    texts: Texts = None,
    minutes: Annotated[float, typer.Option(min=0, help="end after this time, between two rounds")] = 1440.0,
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Learns each round on this machine's own text, until all are done; no text leaves it. Killed, and run again, it
    joins again.

    Exit 1 where none of its updates counted.
    """
    from builders.errors import CheckError
    from builders.spec import load_spec
    from online.federated.client import host_and_port
    from online.federated.tls import TlsIdentity
    from online.loop.joining import own_documents, take_part
    from online.loop.journal import LoopFiles

    loaded = load_spec(spec)
    host_and_port(coordinator)
    identity = TlsIdentity(tls_cert, tls_key, tls_ca)
    identity.parts()
    files = LoopFiles(build_dir, loaded.name)
    documents = own_documents(loaded, files.checkpoint(0), texts, lambda: open_store(loaded, build_dir))
    found = take_part(loaded, files, documents, coordinator, identity, speaker(as_json), 60 * minutes)
    if as_json:
        print(json.dumps({"done": found.done, "rounds": found.rounds, "lost": found.lost}, indent=2))
    if not found.rounds:
        why = "; ".join(f"round {number}: {why}" for number, why in list(found.lost.items())[-3:])
        raise CheckError(f"no update of this client counted in any round{': ' if why else ''}{why}")


@federate.command("offer")
def offer_rounds(
    spec: SpecArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for offer.json and weights.safetensors")],
    held_out: HeldOut = None,
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Begins an update whose rounds another system drives, such as Flower, and writes what it starts from. `trireme
    online federate take` judges what comes of it."""
    from builders.commands import show
    from builders.spec import load_spec
    from online.loop.federating import require_language_model
    from online.loop.journal import LoopJournal
    from online.loop.lessons import write_offer

    loaded = load_spec(spec)
    require_language_model(loaded)
    say = speaker(as_json)
    with LoopJournal(build_dir, loaded.name) as journal, show.build_progress(quiet=as_json) as report:
        loop = open_loop(loaded, build_dir, journal, None, report)
        try:
            _begin(loaded, journal, loop.step, held_out, spec, say)
            offer = write_offer(loaded, journal, out)
        finally:
            loop.close()
    if as_json:
        print(offer.model_dump_json(indent=2))
    say(f"{out} has the offer: {offer.plan.rounds} rounds of {offer.plan.local_steps} steps")


@federate.command("lesson")
def learn_lesson(
    spec: SpecArgument,
    offer: Annotated[Path, typer.Option(help="offer.json of `trireme online federate offer`")],
    weights: Annotated[Path, typer.Option(help="safetensors that the round begins with")],
    number: Annotated[int, typer.Option("--round", min=1, help="the first is 1")],
    out: Annotated[Path, typer.Option("--out", "-o", help="safetensors after this client's steps")],
    texts: Texts = None,
    build_dir: BuildDir = DEFAULT_BUILD,
) -> None:
    """One round of a client whose rounds another system drives: files in, a file and a line of JSON out."""
    from builders.spec import load_spec
    from online.loop import lessons
    from online.loop.joining import own_documents
    from online.loop.journal import LoopFiles

    loaded = load_spec(spec)
    asked = lessons.read_offer(offer)
    files = LoopFiles(build_dir, loaded.name)
    documents = own_documents(loaded, files.checkpoint(0), texts, lambda: open_store(loaded, build_dir))
    found = lessons.learn_lesson(loaded, files, documents, asked, number - 1, weights, out)
    print(found.model_dump_json())


@federate.command("take")
def take_rounds(
    spec: SpecArgument,
    weights: Annotated[Path, typer.Option(help="safetensors that the last round ended with")],
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Judges at the gate what rounds that another system drove have made of an offer; `trireme online run` then builds
    the candidate and rolls it out. Exit 1 where the gate refuses."""
    from builders.spec import load_spec
    from online.loop.journal import LoopJournal
    from online.loop.lessons import BroughtLearning, waiting

    loaded = load_spec(spec)
    with LoopJournal(build_dir, loaded.name) as journal:
        waiting(journal.load())
        _judged(loaded, journal, spec, build_dir, BroughtLearning(weights), None, as_json)


def _judged(
    spec: DeploymentSpec, journal: LoopJournal, name: str, build_dir: Path, learning: Learning,
    held_out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from builders.commands import show

    say = speaker(as_json)
    with show.build_progress(quiet=as_json) as report:
        loop = open_loop(spec, build_dir, journal, None, report)
        loop.learning, loop.federates = learning, True
        try:
            _begin(spec, journal, loop.step, held_out, name, say)
            last = _until_judged(journal, loop.step, say)
        finally:
            loop.close()
            draw_timeline(spec, journal)
        state = journal.load()
    assert state is not None
    update = last.ended or state.update
    if as_json:
        print(json.dumps(None if update is None else update.model_dump(mode="json"), indent=2))
    if last.ended is not None:
        raise SystemExit(1)
    say(f"`trireme online run {name}` builds it and rolls it out")


def _begin(
    spec: DeploymentSpec, journal: LoopJournal, step: Callable[[], Stepped], held_out: Path | None, name: str,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """An update of clients is under way when it returns."""
    from online.loop.federating import begin_federated
    from online.loop.records import UpdateStage

    state = journal.load()
    if state is None:
        say(step().said)
        state = journal.load()
        assert state is not None
    if state.update is None:
        if held_out is None:
            raise InputError(
                "--held-out", got="nothing", expected="texts that judge what the clients bring", fix="name a file"
            )
        say(begin_federated(spec, journal, held_out))
    elif state.update.federated is None or state.update.stage not in (UpdateStage.GATHERED, UpdateStage.TRAINED):
        raise InputError(
            f"update {state.update.number}", got=f"it is {state.update.stage}", expected="none, or rounds",
            fix=f"let `trireme online run {name}` end it, or take it back: `trireme online rollback {name}`",
        )  # fmt: skip
    elif held_out is not None:
        say(f"update {state.update.number} goes on; it is judged by the texts that it began with, not by {held_out}")


def _until_judged(journal: LoopJournal, step: Callable[[], Stepped], say: Callable[[str], None]) -> Stepped:
    """Steps of the loop from where it stands until the gate has spoken."""
    from online.loop.records import UpdateStage

    for _ in range(2):  # trained, and judged
        last = step()
        say(last.said)
        now = journal.load()
        if last.ended is not None or now is None or now.update is None or now.update.stage is UpdateStage.PASSED:
            break
    return last
