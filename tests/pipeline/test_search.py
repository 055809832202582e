"""A search on a tiny model: it keeps what it found, goes on after a kill, and writes a recipe that a build takes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from builders.checkpoint import load_checkpoint
from builders.commands.searching import search
from builders.errors import MachineError, QualityError, SpecError
from builders.pipeline.result import Build
from builders.pipeline.search import _alone, _Bench, _study, _training, searched
from builders.spec import DeploymentSpec, load_spec
from builders.store.store import Store
from tests.compress.tiny import compressing
from tests.conftest import wait_until

OWN: list[dict[str, object]] = [{"prune": {"what": ["ffn"], "ffn": 32, "importance": "magnitude"}}]
LOOSE = {"min_mean_cosine": 0.0}


def _file(
    folder: Path, source: Path, budget: Mapping[str, float], steps: list[dict[str, object]] = OWN
) -> Path:  # fmt: skip
    spec = compressing(source, steps, budget=budget)
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True)))
    return file


def test_it_goes_on_where_it_was_and_writes_a_spec(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _file(tmp_path, tiny_bert, LOOSE)
    search(str(file), trials=1, minutes=9, distil_minutes=0, seed=0, build_dir=tmp_path, as_json=True)
    first = json.loads(capsys.readouterr().out)
    assert (len(first["trials"]), first["resumed"]) == (1, 0)
    _leave_one_running(load_spec(file), tmp_path)
    search(str(file), trials=2, minutes=9, distil_minutes=0, seed=0, build_dir=tmp_path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (len(found["trials"]), found["resumed"]) == (2, 1)
    assert found["trials"][:1] == first["trials"]
    assert found["trials"][0]["steps"] == []
    assert found["trials"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["own"]["steps"][0]["prune"]["ffn"] == 32
    recipe = tmp_path / "tiny" / "search" / "recipe.yaml"
    chosen = next(each for each in found["trials"] if each["number"] == found["chosen"])
    assert [step.model_dump(mode="json", exclude_none=True) for step in load_spec(recipe).compress] == chosen["steps"]
    assert Path(found["page"]).read_text().count("<circle") >= 3
    assert {each["number"] for each in found["finalists"]} <= {each["number"] for each in found["trials"]}


def test_the_best_are_trained_for_a_short_while(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the spec's own steps train; a cosine under the budget does not keep a trial out of it."""
    short = {"minutes": 0.01, "text_tokens": 1_000, "batch_tokens": 512, "learning_rate": 3e-3}
    file = _file(tmp_path, tiny_bert, {"min_mean_cosine": 0.3}, [*OWN, {"distil": short}])
    search(str(file), trials=2, minutes=9, distil_minutes=0.02, seed=0, build_dir=tmp_path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    for each in found["finalists"]:
        *steps, last = each["steps"]
        assert last["distil"] == {**last["distil"], "minutes": 0.02, "text_tokens": 1_000, "learning_rate": 3e-3}
        assert steps == next(one["steps"] for one in found["trials"] if one["number"] == each["number"])
    recipe = load_spec(tmp_path / "tiny" / "search" / "recipe.yaml")
    assert recipe.compress[-1].distil is not None


def test_what_shapes_the_specs_own_student_is_no_part_of_the_training(tiny_bert: Path) -> None:
    """The shape is what was tried."""
    exits = {"exits": [1], "exit": 1, "tokens": 9, "learning_rate": 3e-3}
    found = _training(compressing(tiny_bert, [{"distil": exits}]), 2.0)
    assert found is not None
    assert (found.exits, found.exit, found.tokens, found.minutes, found.learning_rate) == (None, None, None, 2.0, 3e-3)
    zeros = {"minutes": 1, "sparsity": {"amount": 0.5}}
    sparse = _training(compressing(tiny_bert, [{"distil": zeros}]), 2.0)
    assert sparse is not None
    assert sparse.sparsity is None


@pytest.mark.slow
def test_own_steps_that_train_are_measured_too(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"tokens": 2_000, "text_tokens": 1_000, "batch_tokens": 512, "student_layers": [1]}
    file = _file(tmp_path, tiny_bert, LOOSE, [*OWN, {"distil": short}])
    search(str(file), trials=1, minutes=9, distil_minutes=0, seed=0, build_dir=tmp_path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [list(step) for step in found["own"]["steps"]] == [["prune"], ["distil"]]
    assert found["own"]["parameters"] < found["trials"][0]["parameters"]
    assert found["own"]["cosine"] < 0.999


def _leave_one_running(spec: DeploymentSpec, root: Path) -> None:
    """As a process does that is killed within a trial."""
    bench = _Bench.of(spec, Store(root / "store"), lambda stage, message: None)
    study = _study(root / spec.name / "search" / "study.db", bench, seed=0)
    study.ask()


@pytest.mark.slow
def test_no_minutes_no_trials(tiny_bert: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, tiny_bert, LOOSE)
    with pytest.raises(QualityError, match="none of 0 trials is within the budget"):
        search(str(file), trials=2, minutes=0, distil_minutes=0, seed=0, build_dir=tmp_path)


def test_a_budget_that_nothing_meets(tiny_bert: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, tiny_bert, {"min_mean_cosine": 0.5, "min_speedup": 900.0})
    recipe = tmp_path / "tiny" / "search" / "recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("of an earlier budget")
    with pytest.raises(
        QualityError, match=r"none of 1 trials is within the budget; the nearest: the original: cosine 1"
    ):
        search(str(file), trials=1, minutes=9, distil_minutes=0, seed=0, build_dir=tmp_path)
    assert not recipe.exists()


def test_what_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    generates = {"name": "a", "model": {"source": "x/y", "task": "generation"}}
    with pytest.raises(SpecError, match="search is built for encoders"):
        searched(DeploymentSpec.model_validate(generates), tmp_path, 1, 1, 0)
    spec = compressing(tiny_bert, [])
    (tmp_path / spec.name / "search").mkdir(parents=True)
    with (
        _alone(tmp_path / spec.name / "search" / "lock"),
        pytest.raises(MachineError, match="another search that is running"),
    ):
        searched(spec, tmp_path, 1, 1, 0)
    assert Build(spec, "cpu", load_checkpoint(spec.model)).steps == ()


@pytest.mark.slow
def test_kill_minus_nine_loses_no_trial_that_was_complete(tiny_bert: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, tiny_bert, LOOSE)
    command = [
        sys.executable,
        "-m",
        "builders",
        "search",
        str(file),
        "--build-dir",
        str(tmp_path),
        "--trials",
        "4",
        "--distil-minutes",
        "0",
    ]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    database = tmp_path / "tiny" / "search" / "study.db"

    def two_are_complete() -> bool:
        if not database.is_file():
            return False
        with sqlite3.connect(database) as found:
            tables = [name for (name,) in found.execute("select name from sqlite_master where name = 'trials'")]
            done = found.execute("select count(*) from trials where state = 'COMPLETE'") if tables else [(0,)]
            return next(iter(done))[0] >= 2

    try:
        assert wait_until(two_are_complete, 300)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait(60)
    found = searched(load_spec(file), tmp_path, 4, 9, 0)
    assert found.resumed >= 2
    assert len(found.trials) == 4
