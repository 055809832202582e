"""`config.pbtxt` of every model of an encoder service, as protobuf messages. Pure: nothing is read or written.

<name>             ensemble: text -> embedding | logits
<name>-tokenizer   Python backend: text -> token ids, padded to a length bucket on the GPU
<name>-encoder     CPU: Python backend with OpenVINO, ONNX Runtime or rank processes, ragged batches
                   GPU: Triton's tensorrt backend, or the Python backend for TensorRT for RTX
                   GPU, tensor parallel: the tensorrt backend's multi-device mode, one engine a rank
<name>-stage<s>    GPU, pipeline parallel: one model a stage, pinned to GPU s, instead of the encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from builders.artifacts import Checkpoint, PipelineStage, StagePort
from builders.errors import UnsupportedError
from builders.spec import DeploymentSpec, Platform
from runtime.model_config import QUEUE_SIZE


@dataclass(frozen=True)
class EncoderInterface:
    """What the models exchange, as far as it depends on the checkpoint."""

    output: str  # `embedding` or `logits`
    width: int
    token_type_ids: bool
    pair: bool

    @staticmethod
    def of(checkpoint: Checkpoint) -> EncoderInterface:
        embedding = checkpoint.task == "embedding"
        return EncoderInterface(
            output="embedding" if embedding else "logits",
            width=checkpoint.width,
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


def model_configs(
    spec: DeploymentSpec, platform: Platform, interface: EncoderInterface, stages: Sequence[PipelineStage] = ()
) -> dict[str, Any]:
    """ModelConfig messages by model name; the ensemble comes last.

    `stages` are those of a partition; only pipeline stages on a GPU become models of their own. Raises
    UnsupportedError for ranks that no backend of Triton's runs.
    """
    tokenizer = _tokenizer(spec, interface)
    if platform == "gpu" and spec.parallel.ranks > 1:
        require_rank_backend(spec)
    if platform == "cpu":
        parts = [_cpu_encoder(spec, interface)]
    elif spec.parallel.tensor > 1:
        parts = [_multi_device_encoder(spec, interface)]
    elif spec.parallel.pipeline > 1:
        parts = [_stage(spec, interface, stages, index) for index in range(len(stages))]
    else:
        parts = [_gpu_encoder(spec, interface)]
    ensemble = _ensemble(spec, interface, [tokenizer, *parts])
    return {config.name: config for config in (tokenizer, *parts, ensemble)}


def require_rank_backend(spec: DeploymentSpec) -> None:
    """Raises UnsupportedError: Triton's tensorrt backend runs the ranks, on the GPUs 0 … N-1 of one stage."""
    if spec.engine.flavour != "tensorrt":
        raise UnsupportedError(
            "engine.flavour with parallel",
            got=f"{spec.engine.flavour} and {spec.parallel.tensor} x {spec.parallel.pipeline} ranks",
            expected="tensorrt: Triton's own backend runs the ranks, and it loads only engines of full TensorRT",
            fix="set engine.flavour: tensorrt; `--until engine` builds the ranks' engines of this flavour as a check",
        )
    if spec.parallel.tensor > 1 and spec.parallel.pipeline > 1:
        raise UnsupportedError(
            "parallel on GPUs",
            got=f"tensor={spec.parallel.tensor} and pipeline={spec.parallel.pipeline}",
            expected="one of the two: a multi-device model of Triton's tensorrt backend takes the GPUs from 0 on",
            fix="use tensor ranks alone, or stages alone; on CPU both work together",
        )


def uses_tensorrt_backend(spec: DeploymentSpec) -> bool:
    return spec.engine.flavour == "tensorrt"


def _message(**fields: Any) -> Any:
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2.ModelConfig(**fields)


def _tensor(name: str, data_type: str, dims: list[int], *, ragged: bool = False) -> dict[str, Any]:
    tensor: dict[str, Any] = {"name": name, "data_type": data_type, "dims": dims}
    return {**tensor, "allow_ragged_batch": True} if ragged else tensor


def _tokenizer(spec: DeploymentSpec, interface: EncoderInterface) -> Any:
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


def _cpu_encoder(spec: DeploymentSpec, interface: EncoderInterface) -> Any:
    return _message(
        name=f"{spec.name}-encoder",
        backend="python",
        max_batch_size=spec.serving.max_batch_size,
        input=[_tensor(name, "TYPE_INT64", [-1], ragged=True) for name in interface.tokens],
        output=[_tensor(interface.output, "TYPE_FP32", [interface.width])],
        instance_group=[_instances(spec, "KIND_CPU")],
        dynamic_batching=_dynamic_batching(spec, spec.serving.queue_delay_us),
    )


def _gpu_encoder(spec: DeploymentSpec, interface: EncoderInterface) -> Any:
    config = _message(
        name=f"{spec.name}-encoder",
        backend="tensorrt" if uses_tensorrt_backend(spec) else "python",
        max_batch_size=spec.serving.max_batch_size,
        input=[_tensor(name, "TYPE_INT64", [-1]) for name in interface.tokens],
        output=[_tensor(interface.output, "TYPE_FP32", [interface.width])],
        instance_group=[_instances(spec, "KIND_GPU")],
        dynamic_batching=_dynamic_batching(spec, spec.serving.queue_delay_us),
        model_warmup=_warmup(spec, dict.fromkeys(interface.tokens, ("TYPE_INT64", [-1]))),
    )
    if uses_tensorrt_backend(spec):
        _use_plans(spec, config)
    return config


def _multi_device_encoder(spec: DeploymentSpec, interface: EncoderInterface) -> Any:
    """One instance drives a GPU a rank. The backend takes whole requests: no batch dimension, no dynamic batching."""
    gpus = ",".join(str(rank) for rank in range(spec.parallel.tensor))
    return _message(
        name=f"{spec.name}-encoder",
        backend="tensorrt",
        platform="tensorrt_plan",
        max_batch_size=0,
        input=[_tensor(name, "TYPE_INT64", [-1, -1]) for name in interface.tokens],
        output=[_tensor(interface.output, "TYPE_FP32", [-1, interface.width])],
        instance_group=[{**_instances(spec, "KIND_MODEL"), "count": 1}],
        parameters={
            "enable_multi_device": {"string_value": "true"},
            "multi_device_gpus": {"string_value": gpus},
            "multi_device_per_rank_engines": {"string_value": "true"},
        },
        model_warmup=_warmup(
            spec, dict.fromkeys(interface.tokens, ("TYPE_INT64", [spec.serving.max_batch_size, -1])), batch_size=1
        ),
    )


def _stage(spec: DeploymentSpec, interface: EncoderInterface, stages: Sequence[PipelineStage], index: int) -> Any:
    """One pipeline stage on its own GPU: unpinned, ensemble steps land on arbitrary GPUs."""
    stage = stages[index]
    inputs = {port.name: (_data_type(port), _row_dims(port)) for port in stage.inputs}
    outputs = {port.name: (_data_type(port), _row_dims(port)) for port in stage.outputs}
    config = _message(
        name=f"{spec.name}-stage{index}",
        backend="tensorrt",
        max_batch_size=spec.serving.max_batch_size,
        input=[_tensor(name, kind, dims) for name, (kind, dims) in inputs.items()],
        output=[_tensor(name, kind, dims) for name, (kind, dims) in outputs.items()],
        instance_group=[{**_instances(spec, "KIND_GPU"), "gpus": [index]}],
        # Batches are formed before the first stage; they reach the later ones as they are.
        dynamic_batching=_dynamic_batching(spec, spec.serving.queue_delay_us if index == 0 else 0),
        model_warmup=_warmup(spec, inputs),
    )
    _use_plans(spec, config)
    return config


def _use_plans(spec: DeploymentSpec, config: Any) -> None:
    """Triton's tensorrt backend, with an engine for each GPU type."""
    config.platform = "tensorrt_plan"
    config.instance_group[0].profile.extend(str(index) for index in range(len(spec.engine_profiles)))
    for target in spec.engine.targets:
        config.cc_model_filenames[compute_capability(target)] = f"model.{target}.plan"


def _data_type(port: StagePort) -> str:
    return {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}.get(port.dtype, f"TYPE_{port.dtype.upper()}")


def _row_dims(port: StagePort) -> list[int]:
    """Without the batch dimension, which every tensor between stages of an encoder has."""
    if not port.dims or isinstance(port.dims[0], int):
        raise UnsupportedError(
            f"pipeline stage: tensor {port.name}",
            got=f"dims {list(port.dims)}",
            expected="a batch dimension first, so that Triton can form batches",
            fix="use tensor ranks instead of stages for this model",
        )
    return [dim if isinstance(dim, int) else -1 for dim in port.dims[1:]]


def compute_capability(target: str) -> str:
    """`sm89` -> `8.9`, Triton's spelling."""
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"


def _ensemble(spec: DeploymentSpec, interface: EncoderInterface, parts: Sequence[Any]) -> Any:
    """The parts in a row. A tensor keeps its name from the part that makes it to every part that takes it."""
    # Where the last part takes whole requests, so does the ensemble: its dims then begin with the batch.
    rows = [] if parts[-1].max_batch_size else [-1]
    config = _message(
        name=spec.name,
        platform="ensemble",
        max_batch_size=parts[-1].max_batch_size,
        input=[_tensor(name, "TYPE_STRING", [*rows, 1]) for name in interface.texts],
        output=[
            _tensor(interface.output, "TYPE_FP32", [*rows, interface.width]),
            _tensor("token_count", "TYPE_INT32", [*rows, 1]),
            _tensor("truncated", "TYPE_BOOL", [*rows, 1]),
        ],
        ensemble_scheduling={
            "step": [
                {
                    "model_name": part.name,
                    "model_version": -1,
                    "input_map": {tensor.name: tensor.name for tensor in part.input},
                    "output_map": {tensor.name: tensor.name for tensor in part.output},
                }
                for part in parts
            ]
        },
    )
    config.parameters[QUEUE_SIZE].string_value = str(spec.serving.queue_size)
    if spec.serving.response_cache_bytes:
        config.response_cache.enable = True
    return config


def _instances(spec: DeploymentSpec, kind: str) -> dict[str, Any]:
    count = spec.instances_on("cpu" if kind == "KIND_CPU" else "gpu")
    group: dict[str, Any] = {"kind": kind, "count": count}
    limit = spec.serving.rate_limit
    if limit is not None:
        group["rate_limiter"] = {
            "resources": [{"name": limit.resource, "count": limit.count}],
            "priority": limit.priority,
        }
    return group


def _dynamic_batching(spec: DeploymentSpec, delay_us: int) -> dict[str, Any]:
    batching: dict[str, Any] = {"max_queue_delay_microseconds": delay_us}
    if spec.serving.queue_timeout_us:
        batching["default_queue_policy"] = {
            "timeout_action": "REJECT",
            "default_timeout_microseconds": spec.serving.queue_timeout_us,
        }
    return batching


def _warmup(
    spec: DeploymentSpec, inputs: dict[str, tuple[str, list[int]]], batch_size: int | None = None
) -> list[dict[str, Any]]:
    """One full batch of each bucket, so that no user waits for lazy initialisation. A dim of -1 is the length."""
    if not spec.serving.warmup:
        return []
    return [
        {
            "name": f"length-{length}",
            "batch_size": batch_size or spec.serving.max_batch_size,
            "inputs": {
                name: {"data_type": kind, "dims": [length if dim == -1 else dim for dim in dims], "zero_data": True}
                for name, (kind, dims) in inputs.items()
            },
        }
        for length in spec.serving.length_buckets
    ]
