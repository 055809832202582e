"""What executors over rank processes share, of encoders and generators, on CPU and on GPUs: the life of their group."""

from __future__ import annotations

from collections.abc import Callable

from runtime.errors import ServerFault
from runtime.ranks.gathering import Gathering
from runtime.ranks.group import RankGroup
from runtime.ranks.hosts import Hosts
from runtime.ranks.stored import StoredPrograms
from runtime.step import Row, Tokens

STEP_SECONDS = 30.0  # of a rank that hangs; one that dies is noticed at once


START_SECONDS = 120.0  # of a group on CPU, with its weights loaded


def start_group(
    stored: StoredPrograms,
    prepare: Callable[[RankGroup], None] = lambda group: None,
    gathering: Gathering | None = None,
) -> RankGroup:
    """A group that has loaded its programs, on this machine or over a gathering's hosts. What raises leaves no process
    behind.
    """
    group = RankGroup(stored.layout.ranks, start_seconds=START_SECONDS, gathering=gathering)
    try:
        group.load(stored.programs, stored.layout, seconds=START_SECONDS)
        prepare(group)
    except BaseException:
        group.close()
        raise
    return group


class RankGroupHolder:
    """Holds a group from its start until it is closed. Ranks end with the thread that started them: start groups in
    threads that live as long as the holder does.
    """

    def __init__(self, step_seconds: float, hosts: Hosts | None = None) -> None:
        """`hosts`: those that the group spans; None is this machine. Raises BadEnvironment when their port is taken."""
        self.step_seconds = step_seconds
        self._gathering = None if hosts is None else Gathering(hosts)
        self._group: RankGroup | None = None

    @property
    def processes(self) -> list[int]:
        """Process ids, by rank."""
        return [] if self._group is None else self._group.processes

    @property
    def running(self) -> RankGroup:
        """Raises ServerFault where there is none."""
        if self._group is None:
            raise ServerFault("the rank group did not start again")
        return self._group

    def lost(self) -> bool:
        return self._group is None or self._group.wait_for_death(0)

    def encode(self, row: Row, source: Tokens) -> None:
        raise ServerFault("encoder-decoders do not run on ranks")

    def close(self) -> None:
        self.end_group()
        if self._gathering is not None:
            self._gathering.close()

    def end_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None
