"""What one client, and all of them together, may take. Everything that a request can make large has a line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DoorLimits:
    """Sizes in bytes unless the name says otherwise.

    header_bytes, headers      of a request's head, its line included
    chunks                     pieces of a chunked body: each costs a call, however small
    depth                      of nested JSON
    head_s, body_s             until a head, and then a body, must be there
    keep_alive_s               a connection that is idle is closed
    answer_s                   of an answer as a whole, a stream's too
    connections_per_address    more are closed as they come
    bytes_in_flight            bodies of all requests that are held at once
    requests, requests_per_key   that run at once
    rate_per_key               requests a second, with as many at once as a second has; None: no limit
    items                      texts of an embedding request, messages of a chat
    rendered                   characters that a chat template may make
    tokenized                  characters, or token ids, that are turned into the other in one request
    inflated_bytes             of a gRPC message that came compressed
    """

    header_bytes: int = 32 << 10
    headers: int = 100
    body_bytes: int = 8 << 20
    chunks: int = 4096
    depth: int = 32
    head_s: float = 10.0
    body_s: float = 30.0
    keep_alive_s: float = 75.0
    answer_s: float = 600.0
    connections: int = 2048
    connections_per_address: int = 512
    bytes_in_flight: int = 256 << 20
    requests: int = 1024
    requests_per_key: int = 512
    rate_per_key: float | None = None
    items: int = 2048
    prompts: int = 16
    rendered: int = 1 << 20
    tokenized: int = 1 << 18
    inflated_bytes: int = 1 << 20
    upstream_connections: int = 1024
    answer_bytes: int = 256 << 20
