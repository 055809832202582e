"""`python mnn_script.py convert SOURCE TARGET [--fp16]` and `run MODEL OUTPUT GIVEN MADE`, by MNN's own library.

The converter is called in its C++ module. MNN's own command would install a package by pip on the way, and tell
a server of its maker what was converted.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any


def convert(source: str, target: str, *options: str) -> None:
    import _tools

    command = ["mnnconvert", "-f", "ONNX", "--modelFile", source, "--MNNModel", target, "--bizCode", "trireme"]
    if not _tools.mnnconvert([*command, *options]):
        sys.exit(1)


def run(model: str, output: str, given: str, made: str) -> None:
    """`GIVEN` holds `batch/input` arrays, `MADE` gets an array for each batch."""
    import MNN
    import numpy as np
    from MNN import expr

    batches: dict[str, dict[str, Any]] = defaultdict(dict)
    with np.load(given) as arrays:
        for key in arrays.files:
            index, _, name = key.partition("/")
            batches[index][name] = arrays[key]
    names = sorted(next(iter(batches.values())))
    manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high"},))
    network = MNN.nn.load_module_from_file(model, names, [output], runtime_manager=manager)
    found = {}
    for index, batch in batches.items():
        # MNN has no 64-bit integers: ids, masks and types fit 32.
        feeds = [
            expr.const(batch[name].astype(np.int32), list(batch[name].shape), expr.NCHW, expr.int) for name in names
        ]
        found[index] = np.array(expr.convert(network.forward(feeds)[0], expr.NCHW).read(), np.float32)
    np.savez(made, **found)


if __name__ == "__main__":
    verbs: dict[str, Callable[..., None]] = {"convert": convert, "run": run}
    verbs[sys.argv[1]](*sys.argv[2:])
