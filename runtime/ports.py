"""TCP ports that nobody uses."""

from __future__ import annotations

import socket


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Ports of `address` that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind((address, 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()
