"""`config.pbtxt` of a generator, as a protobuf message. Pure: nothing is read or written.

One decoupled Python model does everything, because cancellation does not reach through an ensemble. Its version
directory holds model.py (adapters/generator), settings.json (`GeneratorModelSettings`), tokenizer.json and the graphs
or engines that the settings name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from runtime.generation.interface import INPUTS, OUTPUTS, Tensor


def generator_config(name: str, kind: Literal["KIND_CPU", "KIND_GPU"], gpus: Sequence[int] = ()) -> Any:
    """The ModelConfig message. Batching is the engine's work: Triton hands requests over one by one.

    One instance on each of `gpus`, or on every one there is.

    `max_batch_size` is 1 so that shapes have the batch dimension that clients of TensorRT-LLM's models send.
    """
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2.ModelConfig(
        name=name,
        backend="python",
        max_batch_size=1,
        model_transaction_policy={"decoupled": True},
        input=[{**_tensor(tensor), "optional": True} for tensor in INPUTS],
        output=[_tensor(tensor) for tensor in OUTPUTS],
        instance_group=[{"kind": kind, "count": 1, "gpus": gpus}],
    )


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": tensor.data_type, "dims": [tensor.size]}
