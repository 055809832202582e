"""`config.pbtxt` of every model of an encoder service, as protobuf messages. Pure: nothing is read or written.

<name>             ensemble: text -> embedding | logits
<name>-tokenizer   Python backend: text -> token ids, padded to a length bucket on the GPU
<name>-encoder     CPU: Python backend with OpenVINO or ONNX Runtime, ragged batches
                   GPU: Triton's tensorrt backend, or the Python backend for TensorRT for RTX
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builders.artifacts import Checkpoint
from builders.spec import DeploymentSpec, Platform


@dataclass(frozen=True)
class Interface:
    """What the models exchange, as far as it depends on the checkpoint."""

    output: str  # `embedding` or `logits`
    width: int
    token_type_ids: bool
    pair: bool

    @staticmethod
    def of(checkpoint: Checkpoint) -> Interface:
        embedding = checkpoint.task == "embedding"
        return Interface(
            output="embedding" if embedding else "logits",
            width=checkpoint.hidden_size if embedding else checkpoint.labels,
            token_type_ids=checkpoint.token_type_ids,
            pair=checkpoint.task == "reranking",
        )

    @property
    def texts(self) -> tuple[str, ...]:
        return ("text", "text_pair") if self.pair else ("text",)

    @property
    def tokens(self) -> tuple[str, ...]:
        names = ("input_ids", "attention_mask")
        return (*names, "token_type_ids") if self.token_type_ids else names


def model_configs(spec: DeploymentSpec, platform: Platform, interface: Interface) -> dict[str, Any]:
    """ModelConfig messages by model name; the ensemble comes last."""
    tokenizer = _tokenizer(spec, interface)
    encoder = _cpu_encoder(spec, interface) if platform == "cpu" else _gpu_encoder(spec, interface)
    ensemble = _ensemble(spec, interface, tokenizer.name, encoder.name)
    return {config.name: config for config in (tokenizer, encoder, ensemble)}


def to_pbtxt(config: Any) -> str:
    """Text format, with a default written out where Triton reads its absence as something else."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    return text if "max_batch_size" in text else f"max_batch_size: 0\n{text}"


def uses_tensorrt_backend(spec: DeploymentSpec) -> bool:
    return spec.engine.flavour == "tensorrt"


def _message(**fields: Any) -> Any:
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2.ModelConfig(**fields)


def _tensor(name: str, data_type: str, dims: list[int], *, ragged: bool = False) -> dict[str, Any]:
    tensor: dict[str, Any] = {"name": name, "data_type": data_type, "dims": dims}
    return {**tensor, "allow_ragged_batch": True} if ragged else tensor


def _tokenizer(spec: DeploymentSpec, interface: Interface) -> Any:
    return _message(
        name=f"{spec.name}-tokenizer",
        backend="python",
        max_batch_size=spec.serving.max_batch_size,
        input=[_tensor(name, "TYPE_STRING", [1]) for name in interface.texts],
        output=[
            *(_tensor(name, "TYPE_INT64", [-1]) for name in interface.tokens),
            _tensor("token_count", "TYPE_INT32", [1]),
            _tensor("truncated", "TYPE_BOOL", [1]),
        ],
        instance_group=[{"kind": "KIND_CPU", "count": 1}],
        # No delay here: the encoder's queue is where waiting pays.
        dynamic_batching=_dynamic_batching(spec, delay_us=0),
    )


def _cpu_encoder(spec: DeploymentSpec, interface: Interface) -> Any:
    return _message(
        name=f"{spec.name}-encoder",
        backend="python",
        max_batch_size=spec.serving.max_batch_size,
        input=[_tensor(name, "TYPE_INT64", [-1], ragged=True) for name in interface.tokens],
        output=[_tensor(interface.output, "TYPE_FP32", [interface.width])],
        instance_group=[_instances(spec, "KIND_CPU")],
        dynamic_batching=_dynamic_batching(spec, spec.serving.queue_delay_us),
    )


def _gpu_encoder(spec: DeploymentSpec, interface: Interface) -> Any:
    config = _message(
        name=f"{spec.name}-encoder",
        backend="tensorrt" if uses_tensorrt_backend(spec) else "python",
        max_batch_size=spec.serving.max_batch_size,
        input=[_tensor(name, "TYPE_INT64", [-1]) for name in interface.tokens],
        output=[_tensor(interface.output, "TYPE_FP32", [interface.width])],
        instance_group=[_instances(spec, "KIND_GPU")],
        dynamic_batching=_dynamic_batching(spec, spec.serving.queue_delay_us),
        model_warmup=_warmup(spec, interface),
    )
    if uses_tensorrt_backend(spec):
        config.platform = "tensorrt_plan"
        config.instance_group[0].profile.extend(str(index) for index in range(len(spec.engine.profiles)))
        for target in spec.engine.targets:
            config.cc_model_filenames[compute_capability(target)] = f"model.{target}.plan"
    return config


def compute_capability(target: str) -> str:
    """`sm89` -> `8.9`, Triton's spelling."""
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def _ensemble(spec: DeploymentSpec, interface: Interface, tokenizer: str, encoder: str) -> Any:
    extra = ("token_count", "truncated")
    config = _message(
        name=spec.name,
        platform="ensemble",
        max_batch_size=spec.serving.max_batch_size,
        input=[_tensor(name, "TYPE_STRING", [1]) for name in interface.texts],
        output=[
            _tensor(interface.output, "TYPE_FP32", [interface.width]),
            _tensor("token_count", "TYPE_INT32", [1]),
            _tensor("truncated", "TYPE_BOOL", [1]),
        ],
        ensemble_scheduling={
            "step": [
                {
                    "model_name": tokenizer,
                    "model_version": -1,
                    "input_map": {name: name for name in interface.texts},
                    "output_map": {name: name for name in (*interface.tokens, *extra)},
                },
                {
                    "model_name": encoder,
                    "model_version": -1,
                    "input_map": {name: name for name in interface.tokens},
                    "output_map": {interface.output: interface.output},
                },
            ]
        },
    )
    if spec.serving.response_cache_bytes:
        config.response_cache.enable = True
    return config


def _instances(spec: DeploymentSpec, kind: str) -> dict[str, Any]:
    group: dict[str, Any] = {"kind": kind, "count": spec.serving.instances}
    limit = spec.serving.rate_limit
    if limit is not None:
        group["rate_limiter"] = {
            "resources": [{"name": limit.resource, "count": limit.count}],
            "priority": limit.priority,
        }
    return group


def _dynamic_batching(spec: DeploymentSpec, delay_us: int) -> dict[str, Any]:
    policy: dict[str, Any] = {"max_queue_size": spec.serving.queue_size, "timeout_action": "REJECT"}
    if spec.serving.queue_timeout_us:
        policy["default_timeout_microseconds"] = spec.serving.queue_timeout_us
    return {"max_queue_delay_microseconds": delay_us, "default_queue_policy": policy}


def _warmup(spec: DeploymentSpec, interface: Interface) -> list[dict[str, Any]]:
    """One full batch of each bucket, so that no user waits for lazy initialisation."""
    if not spec.serving.warmup:
        return []
    return [
        {
            "name": f"length-{length}",
            "batch_size": spec.serving.max_batch_size,
            "inputs": {
                name: {"data_type": "TYPE_INT64", "dims": [length], "zero_data": True} for name in interface.tokens
            },
        }
        for length in spec.serving.length_buckets
    ]
