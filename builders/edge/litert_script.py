"""`python litert_script.py check`, `convert PROGRAM TARGET` and `run MODEL OUTPUT GIVEN MADE`, in an environment that
has Google's litert-torch and its LiteRT runtime.

`PROGRAM` is what `torch.export.save` writes, of keyword arguments, which name the inputs of the model.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

PACKAGES = ("torch", "litert-torch", "ai-edge-litert")


def check() -> None:
    print(json.dumps({name: importlib.metadata.version(name) for name in PACKAGES}))


def convert(program: str, target: str) -> None:
    import litert_torch
    import torch

    loaded = torch.export.load(program)
    _, named = loaded.example_inputs
    litert_torch.convert(loaded.module(), sample_kwargs=dict(named)).export(target)


def run(model: str, output: str, given: str, made: str) -> None:
    """`GIVEN` holds `batch/input` arrays, `MADE` gets an array for each batch. The model takes a text at a time."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=model).get_signature_runner()
    shapes = {name: tuple(item["shape"]) for name, item in runner.get_input_details().items()}
    batches: dict[str, dict[str, Any]] = defaultdict(dict)
    with np.load(given) as arrays:
        for key in arrays.files:
            index, _, name = key.partition("/")
            batches[index][name] = arrays[key]
    found: dict[str, list[Any]] = defaultdict(list)
    for index, batch in batches.items():
        for row in range(len(next(iter(batch.values())))):
            feeds = {}
            for name, (_, length) in shapes.items():
                feeds[name] = np.zeros((1, length), np.int32)
                feeds[name][0, : batch[name].shape[1]] = batch[name][row]
            found[index].append(runner(**feeds)[output][0])
    np.savez(made, **{index: np.stack(rows) for index, rows in found.items()})


if __name__ == "__main__":
    verbs: dict[str, Callable[..., None]] = {"check": check, "convert": convert, "run": run}
    verbs[sys.argv[1]](*sys.argv[2:])
