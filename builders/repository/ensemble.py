"""Every edge of an ensemble, checked before anything is written.

Triton finds a wrong edge when it loads the ensemble, on the cluster; some it finds only when a request comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from builders.errors import CheckError


@dataclass(frozen=True)
class Edge:
    """A tensor as one end sees it."""

    place: str
    data_type: int
    dims: tuple[int, ...]


def check_ensemble(ensemble: Any, models: dict[str, Any]) -> None:
    """Raises CheckError for a step or tensor that does not exist, an end that differs in dtype or dims, a tensor that
    is produced twice or never, a required input that is not fed, or a part that takes smaller batches."""
    available = {tensor.name: _edge(f"ensemble input {tensor.name}", tensor, ensemble) for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        part = models.get(step.model_name)
        if part is None:
            _refuse(ensemble, f"step {step.model_name} is not one of the models {sorted(models)}")
        if part.max_batch_size < ensemble.max_batch_size:  # 0: an ensemble of whole requests, whatever its parts take
            _refuse(
                ensemble,
                f"takes batches of {ensemble.max_batch_size}, but its step {part.name} only {part.max_batch_size}",
            )
        _check_inputs(ensemble, step, part, available)
        produced = _by_name(part.output)
        for name, tensor_name in step.output_map.items():
            if name not in produced:
                _refuse(ensemble, f"step {part.name} has no output {name}; it has {sorted(produced)}")
            if tensor_name in available:
                _refuse(ensemble, f"tensor {tensor_name} is produced twice")
            available[tensor_name] = _edge(f"{part.name}.{name}", produced[name], part)
    for tensor in ensemble.output:
        if tensor.name not in available:
            _refuse(ensemble, f"no step produces the output {tensor.name}")
        _compare(ensemble, available[tensor.name], _edge(f"ensemble output {tensor.name}", tensor, ensemble))


def _check_inputs(ensemble: Any, step: Any, part: Any, available: dict[str, Edge]) -> None:
    wanted = _by_name(part.input)
    for name in wanted:
        if name not in step.input_map and not wanted[name].optional:
            _refuse(ensemble, f"nothing feeds the input {name} of step {part.name}")
    for name, tensor_name in step.input_map.items():
        if name not in wanted:
            _refuse(ensemble, f"step {part.name} has no input {name}; it has {sorted(wanted)}")
        if tensor_name not in available:
            _refuse(ensemble, f"tensor {tensor_name} is used by {part.name} before any step produces it")
        _compare(ensemble, available[tensor_name], _edge(f"{part.name}.{name}", wanted[name], part))


def _by_name(tensors: Iterable[Any]) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in tensors}


def _edge(place: str, tensor: Any, model: Any) -> Edge:
    """With the batch dimension, which the dims of a batching model leave out."""
    batch = (-1,) if model.max_batch_size else ()
    return Edge(place, tensor.data_type, (*batch, *tensor.dims))


def _compare(ensemble: Any, source: Edge, target: Edge) -> None:
    if source.data_type != target.data_type:
        _refuse(ensemble, f"{source.place} has type {source.data_type}, but {target.place} {target.data_type}")
    pairs = list(itertools.zip_longest(source.dims, target.dims))
    if any(None in pair or (-1 not in pair and pair[0] != pair[1]) for pair in pairs):
        _refuse(ensemble, f"{source.place} has dims {list(source.dims)}, but {target.place} {list(target.dims)}")


def _refuse(ensemble: Any, reason: str) -> NoReturn:
    raise CheckError(f"ensemble {ensemble.name}: {reason}")
