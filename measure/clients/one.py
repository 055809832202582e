"""One client's questions, in the environment that it is installed in: a line of JSON for each."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from measure.clients.asking import ServedPair, Wrong


def main() -> None:
    client = importlib.import_module(f"measure.clients.with_{sys.argv[1]}")
    served = ServedPair.read(Path(sys.argv[2]))
    told = {"client": client.CLIENT, "version": metadata.version(client.CLIENT)}
    for asked, ask in client.asks(served).items():
        print(json.dumps({**told, "asked": asked, **_result(ask)}), flush=True)


def _result(ask: Callable[[], None]) -> dict[str, str]:
    """With `fault` where it went wrong."""
    try:
        ask()
    except Wrong as wrong:
        return {"fault": str(wrong)}
    except Exception as error:  # noqa: BLE001 - whatever a client raises is what its users would see
        traceback.print_exc()
        return {"fault": f"{type(error).__name__}: {str(error)[:600]}"}
    return {"result": "ok"}


if __name__ == "__main__":
    main()
