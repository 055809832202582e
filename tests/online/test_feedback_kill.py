"""A writer killed at any moment loses no row that it acknowledged."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from online.feedback.store import FeedbackStore
from tests import ROOT


def write_and_kill(url: str, run: str, acknowledgements: int) -> list[str]:
    """What a writer acknowledged before kill -9, which comes after so many; nobody has read a line cut short."""
    command = [sys.executable, "-m", "tests.online.feedback_writer", url, run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(acknowledgements)]
        process.kill()
        seen += process.stdout.readlines()
    return [line.decode().strip() for line in seen if line.endswith(b"\n")]


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_no_acknowledged_row_is_lost(tmp_path: Path, kills: int) -> None:
    url = f"sqlite:///{tmp_path / 'feedback.db'}"
    draw = random.Random(0)
    acknowledged: list[str] = []
    for run in range(kills):
        # The first kills come while the tables are made, or just after.
        found = write_and_kill(url, str(run), draw.choice((0, 1, 5, 50, 200)))
        acknowledged += found
    assert len(acknowledged) > kills
    store = FeedbackStore(url)
    kept = {row["request_id"]: row["text"] for row in map(json.loads, store.export())}
    rows, _ = store.size()
    store.close()
    assert {key: f"text of {key}" for key in acknowledged}.items() <= kept.items()
    with sqlite3.connect(tmp_path / "feedback.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counted = [
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("feedback", "served")
        ]
    assert rows == sum(counted)
