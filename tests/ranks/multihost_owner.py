"""Host 0 of the multi-host test: `python -m tests.ranks.multihost_owner LEADER PORT INTERFACE SECRET`.

Each line on standard input is a request: `group` makes a new group and says what a step gives, `step` runs one more.
Each answer is one line.
"""

from __future__ import annotations

import sys

import numpy as np

from runtime.errors import ServerFault
from runtime.ranks.gathering import Gathering
from runtime.ranks.group import RankGroup
from runtime.ranks.hosts import Hosts
from runtime.ranks.program import Communicate, RankGrid
from tests.partition.test_ranks import program

STEP_SECONDS = 100.0


def main() -> None:
    leader, port, interface, secret = sys.argv[1:]
    hosts = Hosts(leader, int(port), 2, 1, interface, secret)
    group = None
    with Gathering(hosts) as gathering:
        for request in sys.stdin:
            try:
                if request.strip() == "group":
                    group = RankGroup(2, gathering=gathering)
                    group.load([program(Communicate("all_reduce", "y", "z", 2))] * 2, RankGrid(2, 1))
                assert group is not None
                print("stepping", flush=True)
                feeds = [{"x": np.array([rank + 1], np.float32)} for rank in range(2)]
                answer = str([part["z"].tolist() for part in group.run(feeds, ["z"], seconds=STEP_SECONDS)])
            except ServerFault as error:
                answer = f"failed: {error}"
            print(answer, flush=True)
        if group is not None:
            group.close()


if __name__ == "__main__":
    main()
