"""Rounds that another system drives: the offer, lessons and what came of them are files, and the gate judges it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builders.judging.corpus import Document
from online.federated.coordinator import Offer
from online.loop.federating import begin_federated
from online.loop.journal import LoopFiles
from online.loop.lessons import OFFER, WEIGHTS, BroughtLearning, learn_lesson, read_offer, write_offer
from online.loop.records import UpdateStage
from online.loop.steps import Loop
from runtime.errors import InputError
from tests.online.loop_world import Everything, Samples, save_first
from tests.online.small import speech
from tests.online.test_federated_learning import SPEC, texts_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first(tmp_path_factory.mktemp("first") / "model")


@pytest.fixture
def loop(version: Path, tmp_path: Path) -> Iterator[Loop]:
    """With an update that waits for its rounds, and the offer in `tmp_path / "offer"`."""
    found = Everything(tmp_path, version, Samples([]), online=SPEC, without_canary=True)
    with found.process() as loop:
        loop.step()
        begin_federated(loop.spec, loop.journal, texts_file(tmp_path / "held-out.txt", 2, 80, 30))
        write_offer(loop.spec, loop.journal, tmp_path / "offer")
        yield loop


def words(first: int, count: int = 30) -> list[Document]:
    return [Document(str(row), (" ".join(f"w{word}" for word in row),)) for row in speech(2, count, first)]


def joined(tmp_path: Path, loop: Loop, offer: Offer) -> tuple[Path, dict[str, str]]:
    """All rounds of two clients, by the mean; the last weights, and the facts that stand in their file."""
    weights, rows, losses = tmp_path / "offer" / WEIGHTS, 0, []
    for number in range(offer.plan.rounds):
        told, after = [], []
        for client, first in (("amber", 40), ("birch", 90)):
            files = LoopFiles(tmp_path / client, "tiny")
            out = tmp_path / f"{client}-{number}"
            told.append(learn_lesson(loop.spec, files, words(first), offer, number, weights, out))
            after.append(load_file(out))
        rows = sum(one.rows for one in told)
        losses.append(sum(one.loss * one.rows for one in told) / rows)
        weights = tmp_path / f"joined-{number}"
        facts = {"trireme": json.dumps({"key": offer.key, "rows": rows, "losses": losses})}
        save_file({name: (after[0][name] + after[1][name]) / 2 for name in after[0]}, weights, metadata=facts)
    return weights, facts


def test_rounds_as_files_end_at_the_gate(loop: Loop, tmp_path: Path) -> None:
    offer = read_offer(tmp_path / "offer" / OFFER)
    waits = loop.step()
    assert waits.waits
    weights, facts = joined(tmp_path, loop, offer)
    loop.learning, loop.federates = BroughtLearning(weights), True

    save_file(load_file(weights), tmp_path / "bare")
    loop.learning = BroughtLearning(tmp_path / "bare")
    with pytest.raises(InputError, match="no word of what they were made from"):
        loop.step()
    other = {"trireme": json.dumps({**json.loads(facts["trireme"]), "key": "f" * 64})}
    save_file(load_file(weights), tmp_path / "other", metadata=other)
    loop.learning = BroughtLearning(tmp_path / "other")
    with pytest.raises(InputError, match="those of another offer"):
        loop.step()

    loop.learning = BroughtLearning(weights)
    assert "is trained" in loop.step().said
    update = loop.journal.load().update  # type: ignore[union-attr]
    assert update is not None
    assert update.stage is UpdateStage.TRAINED
    assert update.report is not None
    assert update.report.new_rows == json.loads(facts["trireme"])["rows"]
    assert [point.step for point in update.report.curve] == [2, 4]


def test_what_does_not_fit_the_offer_is_refused(loop: Loop, tmp_path: Path) -> None:
    offer, weights = read_offer(tmp_path / "offer" / OFFER), tmp_path / "offer" / WEIGHTS
    files, out = LoopFiles(tmp_path / "amber", "tiny"), tmp_path / "out"
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file({**tensors, first: np.full_like(tensors[first], np.nan)}, tmp_path / "nan")
    (tmp_path / "none").write_text("{}")
    with pytest.raises(InputError, match="offer"):
        read_offer(tmp_path / "none")
    for given, number, file, said in (
        (offer, 2, weights, "expected 1 to 2"),
        (offer.model_copy(update={"window": 8}), 0, weights, r"online\.learner\.window"),
        (offer.model_copy(update={"architecture": "0" * 64}), 0, weights, "another configuration"),
        (offer, 0, tmp_path / "nan", "NaN or infinity"),
        (offer, 0, tmp_path / "none", "no safetensors"),
    ):
        with pytest.raises(InputError, match=said):
            learn_lesson(loop.spec, files, words(40), given, number, file, out)
    with pytest.raises(InputError, match="too short for one row"):
        learn_lesson(loop.spec, files, [], offer, 0, weights, out)
    assert not out.exists()
