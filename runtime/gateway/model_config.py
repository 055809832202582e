"""What is shown of a model's configuration: clients that measure ask for it before they infer.

Built here from what the model is for its callers. Triton's own has the parts of an ensemble, where they run, parameters
with paths, and files: none of them is passed on.
"""

from __future__ import annotations

from typing import Any

from runtime.gateway.triton import Facts

_PLATFORM = "trireme"  # who reads `ensemble` looks for its parts


def shown_config(facts: Facts) -> dict[str, Any]:
    """By the field names of Triton's `ModelConfig`; sizes without the batch's, as there."""
    return {
        "name": facts.metadata["name"],
        "platform": _PLATFORM,
        "max_batch_size": facts.max_batch_size,
        "input": [
            {**_tensor(item, facts), "optional": item["name"] in facts.optional} for item in facts.metadata["inputs"]
        ],
        "output": [_tensor(item, facts) for item in facts.metadata["outputs"]],
        "model_transaction_policy": {"decoupled": facts.generates},
    }


def _tensor(item: dict[str, Any], facts: Facts) -> dict[str, Any]:
    kind = "STRING" if item["datatype"] == "BYTES" else item["datatype"]
    sizes = item["shape"][1:] if facts.max_batch_size else item["shape"]
    return {"name": item["name"], "data_type": f"TYPE_{kind}", "dims": list(sizes), "is_shape_tensor": False}


def config_message(facts: Facts) -> bytes:
    """The same as gRPC has it."""
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc import model_config_pb2, service_pb2

    config = ParseDict(shown_config(facts), model_config_pb2.ModelConfig())
    return bytes(service_pb2.ModelConfigResponse(config=config).SerializeToString())
