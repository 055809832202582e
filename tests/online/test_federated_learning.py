"""What a client learns is the learner's own training; and an update that clients trained is one as every other."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from builders.errors import DivergedError
from builders.training.optimiser import Optimiser
from online.federated.client import FederatedClient
from online.federated.local import Learnt, Lesson, LocalLearner
from online.federated.moments import no_moments
from online.federated.tensors import Floats, weights_of
from online.federated.wire import JoinHello
from online.gate.architecture import fingerprint
from online.learner.memory import load_memory
from online.learner.recipe import UpdateRecipe
from online.loop.federating import FederatedLearning, begin_federated
from online.loop.first import adopt
from online.loop.journal import LoopFiles, LoopJournal
from online.loop.records import LoopState, PromotedVersion, UpdateStage
from online.loop.steps import Loop
from online.tasks.language import load_language_model
from online.tasks.task import Rows
from runtime.errors import InputError
from runtime.ports import free_ports
from tests import ROOT
from tests.online.federated_world import issue
from tests.online.loop_world import Everything, Samples, loop_spec, save_first
from tests.online.small import LANGUAGE, WINDOW, save_small, speech

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = speech(2, 60, 10)
RECIPE = UpdateRecipe(steps=12, rows=4, learning_rate=0.01)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first(tmp_path_factory.mktemp("first") / "model")


def learnt(learner: LocalLearner, start: dict[str, Floats], rounds: int, **given: Any) -> dict[str, Floats]:
    """After all rounds of a client that is alone."""
    weights = start
    for number in range(rounds):
        lesson = Lesson("key", number, rounds, RECIPE.steps // rounds, RECIPE, **given)
        found = learner.learn(lesson, weights)
        weights = {name: weights[name] + found.update[name] for name in weights}
    return weights


def test_rounds_of_one_client_are_one_training(version: Path, tmp_path: Path) -> None:
    """Its optimiser, its batches and its learning rate go on where they were, in another process too. An optimiser that
    begins anew comes elsewhere."""
    start = weights_of(load_language_model(version))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = learnt(LocalLearner(LANGUAGE, version, ROWS, ROWS[:4], tmp_path / "a"), start, 1)
    weights = start
    for number in range(3):  # a new process each time, which tries the second round twice
        for _ in range(1 + (number == 1)):
            learner = LocalLearner(LANGUAGE, version, ROWS, ROWS[:4], tmp_path / "b")
            found = learner.learn(Lesson("key", number, 3, 4, RECIPE), weights)
        weights = {name: weights[name] + found.update[name] for name in weights}
    assert _apart(whole, weights) < 0.02 * _apart(whole, start)
    (tmp_path / "c").mkdir()
    anew, weights = LocalLearner(LANGUAGE, version, ROWS, ROWS[:4], tmp_path / "c"), start
    for number in range(3):
        anew.forget()
        found = anew.learn(Lesson("key", number, 3, 4, RECIPE), weights)
        weights = {name: weights[name] + found.update[name] for name in weights}
    assert _apart(whole, weights) > 0.1 * _apart(whole, start)


def test_a_client_alone_that_shares_its_moments_is_one_training_too(version: Path, tmp_path: Path) -> None:
    """They come with the weights and go with the update: a client that has just come goes on where the last one was."""
    model = load_language_model(version)
    start = weights_of(model)
    whole = learnt(LocalLearner(LANGUAGE, version, ROWS, ROWS[:0], tmp_path), start, 1)
    told: dict[str, Floats] = {**start, **no_moments(model, RECIPE)}
    for number in range(3):
        lesson = Lesson("key", number, 3, 4, RECIPE, shared=True)
        found = LocalLearner(LANGUAGE, version, ROWS, ROWS[:0], tmp_path / f"new-{number}").learn(lesson, told)
        told = {name: found.update[name] + (told[name] if name in start else 0) for name in told}
    assert _apart(whole, {name: told[name] for name in start}) < 0.02 * _apart(whole, start)


def _apart(one: dict[str, Floats], other: dict[str, Floats]) -> float:
    return float(np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one)))


def test_fedprox_holds_a_client_near_to_where_it_began(version: Path, tmp_path: Path) -> None:
    start = weights_of(load_language_model(version))
    moved = []
    for prox in (0.0, 1.0, 100.0):
        folder = tmp_path / str(prox)
        folder.mkdir()
        moved.append(
            _apart(learnt(LocalLearner(LANGUAGE, version, ROWS, ROWS[:0], folder), start, 1, prox=prox), start)
        )
    assert moved[0] > moved[1] > moved[2] > 0


def test_a_client_whose_training_diverges_raises(version: Path, tmp_path: Path) -> None:
    wild = RECIPE.model_copy(update={"optimiser": Optimiser(kind="sgd"), "learning_rate": 0.99, "clip": 1e30})
    start = {name: value * 1e12 for name, value in weights_of(load_language_model(version)).items()}
    learner = LocalLearner(LANGUAGE, version, ROWS, ROWS[:0], tmp_path)
    with pytest.raises(DivergedError):
        learner.learn(Lesson("key", 0, 3, 4, wild), start)


SPEC = {"learner": {"rows": 8, "steps": 4}, "federated": {"rounds": 2, "min_clients": 2, "clients": 2, "gather_s": 30,
        "deadline_s": 60}}  # fmt: skip


def texts_file(file: Path, language: int, count: int, first: int = 1) -> Path:
    rows = speech(language, count, first)
    file.write_text("".join(f"{' '.join(f'w{word}' for word in row)}\n" for row in rows))
    return file


def test_an_update_of_clients_goes_the_way_of_every_update(version: Path, tmp_path: Path) -> None:
    """Begun, trained by two clients over mTLS, judged, built and promoted by the loop; one that does not federate waits
    with it; one that is killed after the training goes on."""
    found = Everything(tmp_path, version, Samples([]), online=SPEC, without_canary=True)
    held_out = texts_file(tmp_path / "held-out.txt", 2, 80, 30)
    known = issue(tmp_path / "certificates", ["coordinator", "amber", "birch"])
    (port,) = free_ports(1)
    said: list[str] = []
    with found.process() as loop:
        assert "is the first" in loop.step().said
        with pytest.raises(InputError, match="rows of 16 tokens"):
            begin_federated(loop.spec, loop.journal, texts_file(tmp_path / "short.txt", 2, 3))
        assert "2 rounds of 2 steps" in begin_federated(loop.spec, loop.journal, held_out)
        waiting = loop.step()
        assert waiting.waits
        assert "federate serve" in waiting.said
        loop.learning = FederatedLearning(f"127.0.0.1:{port}", known["coordinator"], said.append)
        loop.federates = True
        threads = _two_clients(loop, version, known, port)
        assert "is trained" in loop.step().said
        for thread in threads:
            thread.join(60)
    with found.process() as loop:  # another process: what is trained is not trained again
        update = loop.journal.load().update  # type: ignore[union-attr]
        assert update is not None
        assert (update.stage, update.report and update.report.new_rows) == (UpdateStage.TRAINED, 60)
        candidate = loop.journal.checkpoint(update.number)
        memory = load_memory(candidate)
        assert list(memory.held_out) == ["one", "update-1"]
        assert fingerprint(candidate) == fingerprint(version)
        assert [point.step for point in update.report.curve] == [2, 4]  # type: ignore[union-attr]
        assert update.report.curve[0].held_out is not None  # type: ignore[union-attr]
        assert not list((candidate.parent / "federated").glob("*.safetensors"))
        for _ in range(3):
            step = loop.step()
        assert step.ended is not None
        assert step.ended.stage is UpdateStage.PROMOTED
    assert any("round 2 of 2" in line for line in said)


def _two_clients(loop: Loop, version: Path, known: dict[str, Any], port: int) -> list[threading.Thread]:
    threads = []
    for number, name in enumerate(("amber", "birch")):
        folder = loop.journal.folder / name
        folder.mkdir()
        rows: Rows = speech(2, 30, 40 + number)
        learner = LocalLearner(LANGUAGE, version, rows, rows[:4], folder)
        told = JoinHello(architecture=fingerprint(version), window=WINDOW, samples=len(rows))
        client = FederatedClient(f"127.0.0.1:{port}", known[name], told, learner)
        threads.append(threading.Thread(target=client.run, args=(120,), daemon=True))
        threads[-1].start()
    return threads


def test_a_model_of_another_kind_does_not_federate(version: Path, tmp_path: Path) -> None:
    spec = loop_spec(version)
    other = spec.model_copy(update={"model": spec.model.model_copy(update={"task": "embedding"})})
    with LoopJournal(tmp_path, "tiny") as journal, pytest.raises(InputError, match=r"model\.task"):
        begin_federated(other, journal, tmp_path / "none")


@pytest.mark.slow  # six processes that import torch
def test_commands_of_three_machines(tmp_path: Path) -> None:
    """A coordinator and two clients as people run them: the coordinator is killed after its first round, and what the
    clients bring passes the gate."""
    model = save_small(tmp_path / "model")
    from tests.online.loop_world import save_first as first

    (model / "tokenizer.json").write_bytes((first(tmp_path / "words") / "tokenizer.json").read_bytes())
    online = {"learner": {"window": WINDOW, "rows": 8, "steps": 40, "learning_rate": 0.001},
              "gate": {"max_forgetting": 1.0}, "federated": {**SPEC["federated"], "rounds": 4}}  # fmt: skip
    spec = {"name": "tiny", "model": {"source": str(model), "task": "generation", "max_length": WINDOW},
            "precision": {"cpu": "fp32"}, "online": online}  # fmt: skip
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    begun(file, tmp_path / "coordinator")
    known = issue(tmp_path / "certificates", ["coordinator", "amber", "birch"])
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"

    def command(name: str, *arguments: str) -> subprocess.Popen[str]:
        own = known[name]
        tls = ["--tls-cert", str(own.chain), "--tls-key", str(own.key), "--tls-ca", str(own.authority)]
        line = [sys.executable, "-m", "builders", "online", "federate", *arguments[:1], str(file), *tls]
        line += [*arguments[1:], "--build-dir", str(tmp_path / name)]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    held_out = str(texts_file(tmp_path / "held-out.txt", 2, 200, 30))
    processes = [command("coordinator", "serve", "--listen", address, "--held-out", held_out)]
    try:
        for number, name in enumerate(("amber", "birch")):
            texts = str(texts_file(tmp_path / f"{name}.txt", 2, 200, 50 + number))
            processes.append(command(name, "join", "--coordinator", address, "--texts", texts))
        lines = processes[0].stdout
        assert lines is not None
        assert any("round 1 of 4" in lines.readline() for _ in range(40))
        processes[0].kill()
        processes[0].wait(10)
        processes.append(command("coordinator", "serve", "--listen", address))
        outputs = [process.communicate(timeout=300)[0] for process in processes[1:]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    assert [process.returncode for process in processes[1:]] == [0, 0, 0], "\n\n".join(outputs)
    state = LoopFiles(tmp_path / "coordinator", "tiny").load()
    assert state is not None
    assert state.update is not None
    assert state.update.stage is UpdateStage.PASSED, outputs[-1]
    history = json.loads((tmp_path / "coordinator/tiny/online/updates/0001/federated/rounds.json").read_text())
    assert [record["number"] for record in history["history"]] == [0, 1, 2, 3]


def begun(spec: Path, build_dir: Path) -> None:
    """As if the first version had been built: that takes minutes, and other tests do it."""
    from builders.spec import load_spec

    loaded = load_spec(str(spec))
    with LoopJournal(build_dir, loaded.name) as journal:
        checkpoint, _ = adopt(loaded, journal.checkpoint(0))
        first = PromotedVersion(version=1, update=0, since="2026-01-01T00:00:00+00:00", settings="{}")
        journal.save(LoopState(origin=checkpoint.digest, promoted=(first,), highest=1, learnt_at=0.0))


def test_a_learner_says_what_it_learnt(version: Path, tmp_path: Path) -> None:
    found = LocalLearner(LANGUAGE, version, ROWS, ROWS[:4], tmp_path).learn(
        Lesson("key", 0, 1, 4, RECIPE), weights_of(load_language_model(version))
    )
    assert isinstance(found, Learnt)
    assert found.loss > 0
    assert found.held_out is not None
    assert found.held_out > 0
