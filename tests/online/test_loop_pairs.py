"""The same loop for an embedding model: fed by pairs, whatever crashes; and once with everything real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import pipeline
from builders.__main__ import app
from builders.checkpoint import load_checkpoint
from builders.spec import load_spec
from online.learner.memory import Memory, Reservoir, load_memory, save_memory
from online.loop.journal import LoopJournal
from online.loop.learning import TaskLearning
from online.loop.records import UpdateStage
from online.loop.timeline import row_of, timeline_page
from online.tasks.opening import open_task
from runtime.errors import InputError
from tests.conftest import save_tiny
from tests.online.encoders import labels, pairs, rows_of
from tests.online.loop_world import Everything, Samples, loop_spec, ran
from tests.online.small import WINDOW
from tests.online.test_loop import lived, require_whole
from tests.online.test_rollout import NEW, World

ROWS = list(enumerate(pairs("close", 200, 3), 1))
SAID = {"request_id": "c", "kind": "correction", "prompt": "a", "answer": None, "text": "b"}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("first") / "model", "bert")
    model = loop_spec(folder, "embedding").model
    task = open_task(model, load_checkpoint(model), WINDOW)
    kept = Reservoir.empty(task.width).offered(rows_of(task, pairs("open", 80, 1)), np.random.default_rng(0))
    save_memory(Memory(kept).with_domain("one", rows_of(task, pairs("open", 60, 2))), folder)
    return folder


@given(crashes=st.sets(st.integers(1, 130), max_size=6), kind=st.sampled_from(["", "gate", "failing"]))
@settings(max_examples=6, deadline=None)
def test_pairs_make_a_version_or_none_whatever_crashes(first: Path, crashes: set[int], kind: str) -> None:
    world = World(failing={NEW: 0.5} if kind == "failing" else {})
    ends = {"": UpdateStage.PROMOTED, "gate": UpdateStage.REFUSED, "failing": UpdateStage.ROLLED_BACK}
    for found, state in lived(first, crashes, world, ROWS, refuses=kind, task="embedding"):
        require_whole(found, state, ends[kind], ROWS[-1][0])


def test_pairs_are_learnt_and_what_was_not_read_is_named(first: Path, tmp_path: Path) -> None:
    learner = {"steps": 30, "learning_rate": 0.003}
    found = Everything(
        tmp_path, first, Samples([*ROWS, (201, SAID)]), task="embedding", learning=TaskLearning(), without_canary=True,
        online={"learner": learner, "gate": {"max_forgetting": 0.5, "max_fall": 0.5}},
    )  # fmt: skip
    state = ran(found)
    with LoopJournal(tmp_path, "tiny") as files:
        (record,) = files.ended()
        assert load_memory(files.checkpoint(1)).held_out.keys() == {"one", "update-1"}
    assert record.stage is UpdateStage.PROMOTED, record.reason
    assert (record.task, record.samples, record.unread, state.fed_to) == ("embedding", 200, 1, 201)
    assert record.verdict is not None
    assert record.verdict.new is not None
    assert record.verdict.new.high < 0
    told = " ".join(row_of(record))
    assert "not read: 1 x a correction says nothing to an embedding model" in told
    assert "found first" in told
    assert "the right text among those of the hold-out" in timeline_page("tiny", state, [record])


def test_corrections_alone_are_waited_out_by_name(first: Path, tmp_path: Path) -> None:
    found = Everything(tmp_path, first, Samples([(1, SAID)]), task="embedding")
    with found.process() as loop:
        loop.step()
        said = loop.step().said
    assert said.startswith("no new feedback to learn from (but 1 x a correction says nothing to an embedding model")


def test_a_memory_of_another_window_is_refused(first: Path, tmp_path: Path) -> None:
    found = Everything(tmp_path, first, Samples(ROWS), task="embedding", online={"learner": {"window": 8}})
    with found.process() as loop:
        loop.step()
        with pytest.raises(InputError, match="16, as the version's memory has it"):
            loop.step()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["embedding", "classification"])
def test_from_a_file_to_a_version_by_the_commands(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real learning, and the real pipeline with its proof."""
    made = pairs if task == "embedding" else labels
    save_tiny(tmp_path / "model", "bert", task)
    (tmp_path / "old").write_text("".join(_old_line(one) for one in made("open", 400, 1)))
    model: dict[str, Any] = {"source": str(tmp_path / "model"), "task": task, "max_length": 64}
    model |= {"pooling": "mean", "normalize": True} if task == "embedding" else {}
    online = {
        "old_texts": "old", "when": {"samples": 100}, "gate": {"max_forgetting": 1.0, "max_fall": 1.0},
        "learner": {"window": 32, "steps": 30, "learning_rate": 0.003, "held_out_share": 0.4},
    }  # fmt: skip
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump({
        "name": "tiny", "model": model, "precision": {"cpu": "fp32", "calibration_samples": 32},
        "serving": {"max_batch_size": 8, "length_buckets": [16, 64]}, "online": online,
    }))  # fmt: skip
    (tmp_path / "feedback").write_text("".join(f"{json.dumps(_told(one))}\n" for one in made("close", 240, 2)))
    where = ["--build-dir", str(tmp_path / "build")]
    assert _run("online", "feedback", "add", str(tmp_path / "feedback"), "--spec", str(spec), *where) == 0
    assert _run("online", "run", str(spec), "--once", "--without-canary", *where) == 0
    capsys.readouterr()
    assert _run("online", "status", str(spec), "--json", *where) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["champion"], found["updates"][0]["stage"], found["updates"][0]["task"]) == (2, "promoted", task)
    repository = pipeline.repository_path(tmp_path / "build", load_spec(spec), "cpu")
    assert (repository / "tiny" / "2").is_dir()


def _old_line(one: dict[str, Any]) -> str:
    if one["kind"] == "pair":
        return f"{one['query']}\t{one['positive']}\n"
    return f"{one['label'].removeprefix('LABEL_')}\t{one['prompt']}\n"


def _told(one: dict[str, Any]) -> dict[str, Any]:
    """As a file has it: without what its row has of itself."""
    return {key: value for key, value in one.items() if value is not None and key != "request_id"}


def _run(*arguments: str) -> int:
    """Of `trireme`, in this process."""
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    print(done.output)
    return done.exit_code
