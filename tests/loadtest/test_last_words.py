"""A run of several processes does not end before each has told what it saw. Locust's own limit for that is 0.5 s."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT

# In a process of its own, because Locust changes the standard library of the one that imports it.
_SCRIPT = """
from types import SimpleNamespace
from locust.runners import STATE_INIT, STATE_MISSING, MasterRunner, WorkerNode, WorkerNodes
from loadtest.drive.locustfile import ScheduledShape

master = MasterRunner.__new__(MasterRunner)
master.greenlet, master.clients = None, WorkerNodes()
for name in "ab":
    master.clients[name] = WorkerNode(name, STATE_INIT)
options = SimpleNamespace(load_shape="constant", num_users=2, warm_up_s=0, duration_s=60, load_steps=1,
                          request_timeout_s=10.0)
master.environment = SimpleNamespace(parsed_options=options)
shape = ScheduledShape()
shape.runner = master

master.clients["a"].user_classes_count = {"TritonUser": 1}
shape.end()
said = [shape.tick()]                      # a still has a user
shape.hear("b", 0)                         # from before the last user left: not b's last word
master.clients["a"].user_classes_count = {}
said.append(shape.tick())                  # nobody asks any more
shape.hear("a", 0)
said.append(shape.tick())                  # b has not told
LAST
said.append(shape.tick())
print(said)
"""


@pytest.mark.parametrize(
    "last",
    ['shape.hear("b", 0)', 'master.clients["b"].state = STATE_MISSING', "shape.ended_at -= 60"],
    ids=["told", "lost", "late"],
)
def test_the_end_waits_for_every_worker(last: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.replace("LAST", last)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[(0, 2.0), (0, 2.0), (0, 2.0), None]"
