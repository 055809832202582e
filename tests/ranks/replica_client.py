"""A client on the leader's host of a replica: `python -m tests.ranks.replica_client GRPC_PORT HEALTH_PORT`.

Each line on standard input is a request as JSON: {"prompts": [[token, …], …], "max_tokens": n} asks for all of them at
once, as streams; {"ready": true} asks the health port. Each line of the answer is an event as JSON: a stream that has
its first tokens, one that has ended, with its tokens or its error, and when, by the clock that all processes share.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace
from typing import Any

from tritonclient.utils import InferenceServerException

from tests.generation.test_triton import Streams


def tell(**event: Any) -> None:
    print(json.dumps({**event, "at": time.monotonic()}), flush=True)


def stream(port: str, asked: list[list[int]], max_tokens: int) -> None:
    client = Streams(SimpleNamespace(grpc_address=f"127.0.0.1:{port}"))  # type: ignore[arg-type]
    made: dict[int, list[int]] = {number: [] for number in range(len(asked))}
    for number, prompt in enumerate(asked):
        client.ask(number, input_ids=prompt, max_tokens=max_tokens)
    while client.open:
        try:
            number, outputs = client.take()
        except InferenceServerException as error:
            tell(error=str(error))
            continue
        if not made[number]:
            tell(began=number)
        made[number] += outputs["output_ids"]
        if "finish_reason" in outputs:
            tell(ended=number, tokens=made[number])
    client.leave()
    tell(done=True)


def ready(port: str) -> None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            tell(ready=answer.status)
    except urllib.error.HTTPError as error:
        tell(ready=error.code, why=error.read().decode().strip())
    except OSError as error:
        tell(ready=0, why=str(error))


def main() -> None:
    grpc_port, health_port = sys.argv[1:]
    for line in sys.stdin:
        request = json.loads(line)
        if "ready" in request:
            ready(health_port)
        else:
            stream(grpc_port, request["prompts"], request["max_tokens"])


if __name__ == "__main__":
    main()
