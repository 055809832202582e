"""A rank that stops in the middle: `python -m tests.ranks.stopping_rank RANK RANKS MEETING FD PARENT`.

A command names what it does: `answer` at once, `half` of an answer and no more, nothing and be `deaf` for what comes,
or something that is `no answer` at all.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from multiprocessing.connection import Connection

from runtime.ranks import wire
from runtime.ranks.worker import die_with_parent


def main() -> None:
    _, _, _, descriptor, parent = sys.argv[1:6]
    die_with_parent(int(parent))
    connection = Connection(int(descriptor))
    connection.send_bytes(wire.encode(("done", None)))
    while True:
        name, arguments = wire.decode(connection.recv_bytes())
        if name == "half":
            os.write(connection.fileno(), struct.pack("!i", 1000) + b"half")
        if name in ("half", "deaf"):
            signal.pause()
        if name == "no answer":
            connection.send_bytes(b"no message of ours")
        else:
            connection.send_bytes(wire.encode(("done", arguments)))


if __name__ == "__main__":
    main()
