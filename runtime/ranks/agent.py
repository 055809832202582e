"""What runs on the other hosts of a group: `serve_host` starts their ranks and ends them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import AuthenticationError
from pathlib import Path
from tempfile import TemporaryDirectory

from runtime.errors import BadEnvironment
from runtime.ranks.channel import Channel
from runtime.ranks.hosts import GREETING_S, WORD, Hello, Hosts, dial
from runtime.ranks.process import CPU_WORKER, end_processes, last_words, start_rank

_PAUSE_S = 0.5  # between attempts
_POLL_S = 0.2


def serve_host(hosts: Hosts, host: int, stopped: Callable[[], bool], worker: str = CPU_WORKER) -> None:
    """An agent: runs this host's ranks for one group after another, until `stopped`. `worker` is the module of a rank.

    Raises BadEnvironment when the leader does not know the secret; an absent leader is waited for.
    """
    while not stopped():
        try:
            control = dial(hosts, Hello("host", host, hosts.content))
        except AuthenticationError as error:
            raise BadEnvironment(f"host {host} and leader {hosts.leader} were given different secrets") from error
        except (OSError, EOFError):
            time.sleep(_PAUSE_S)
            continue
        with closing(control):
            _serve_group(hosts, host, control, stopped, worker)


def _serve_group(hosts: Hosts, host: int, control: Channel, stopped: Callable[[], bool], worker: str) -> None:
    """Returns when the leader has ended the group, or is lost."""
    try:
        meeting = _next_message(control, stopped)
        if meeting is not None:
            with _ranks(hosts, host, meeting, worker):
                while _next_message(control, stopped) is not None:
                    pass
    except (OSError, EOFError):
        return


def _next_message(control: Channel, stopped: Callable[[], bool]) -> str | None:
    """What the leader says, but for the words that only show that it is there; None when asked to stop. One that has
    begun must come to its end. Raises OSError, EOFError.
    """
    while not stopped():
        if control.poll(_POLL_S):
            message = control.recv_bytes(until=time.monotonic() + GREETING_S)
            if message != WORD:
                return message.decode()
    return None


@contextmanager
def _ranks(hosts: Hosts, host: int, meeting: str, worker: str) -> Iterator[None]:
    """This host's rank processes, each with a connection of its own to the leader."""
    processes: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory(prefix="trireme-host-") as folder:
        logs = {rank: Path(folder) / f"rank{rank}.log" for rank in hosts.local(host)}
        try:
            for rank, log in logs.items():
                with dial(hosts, Hello("rank", rank, meeting)).detach() as commands:
                    end = commands.fileno()
                    processes.append(start_rank(rank, hosts.ranks, meeting, hosts.interface, end, log, worker))
            yield
        finally:
            _tell_deaths(processes, list(logs.values()))
            end_processes(processes)


def _tell_deaths(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    """The last words of ranks that ended by themselves: the leader does not get them."""
    for process, log in zip(processes, logs, strict=False):
        if process.poll() is not None:
            print(f"ranks: {log.stem} has died ({process.returncode}) {last_words(log)}", file=sys.stderr, flush=True)
