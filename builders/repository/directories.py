"""What each model directory of a repository holds: its configuration, and for each version files and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from builders.artifacts import Checkpoint, Engine, OnnxGraph, Partition, RankFiles
from builders.checkpoint.chat import chat_settings
from builders.checkpoint.labels import label_names
from builders.errors import UnsupportedError
from builders.judging.perplexity import ENCODER_FILE
from builders.judging.vectors import tokenizer_settings
from builders.repository.encoder_config import EncoderInterface, model_configs, uses_tensorrt_backend
from builders.repository.ensemble import check_ensemble
from builders.repository.generator_config import generator_config
from builders.spec import DeploymentSpec, Platform
from runtime.model_config import to_pbtxt
from runtime.ranks.stored import MANIFEST
from runtime.settings import (
    EncoderModelSettings,
    GeneratorModelSettings,
    RankCacheSettings,
    ServedModel,
    Settings,
    TokenizerModelSettings,
)
from runtime.tensorrt.rank_manifest import MANIFEST as ENGINES

ADAPTERS = Path(__file__).parents[2] / "model_repository" / "adapters"
Part = OnnxGraph | RankFiles | Engine


@dataclass(frozen=True)
class ModelDirectory:
    """One model to publish: its configuration, and for each version its files and settings."""

    config: str
    files: dict[str, Path]
    settings: Settings | None


def model_directories(
    spec: DeploymentSpec,
    platform: Platform,
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    partition: Partition | None,
    served: ServedModel,
) -> dict[str, ModelDirectory]:
    """By model name. Raises CheckError for an ensemble that does not fit; UnsupportedError where no backend runs it."""
    if spec.generates:
        return _generator_directory(spec, platform, checkpoint, parts, partition, served)
    return _encoder_directories(spec, platform, checkpoint, parts, partition, served)


def _encoder_directories(
    spec: DeploymentSpec,
    platform: Platform,
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    partition: Partition | None,
    served: ServedModel,
) -> dict[str, ModelDirectory]:
    stages = partition.stages if partition is not None else ()
    configs = model_configs(spec, platform, EncoderInterface.of(checkpoint), stages)
    check_ensemble(configs[spec.name], configs)
    if checkpoint.prompts is not None and spec.serving.response_cache_bytes:
        raise UnsupportedError(
            "serving.response_cache_bytes", got=f"{spec.serving.response_cache_bytes} for a model with prompts",
            expected="0: Triton's cache looks at a request's text, not at its parameter prompt_name",
            fix="remove it",
        )  # fmt: skip
    buckets = spec.serving.length_buckets if platform == "gpu" else ()
    labels, multi_label = label_names(checkpoint)
    tokenizer = TokenizerModelSettings(
        tokenizer=tokenizer_settings(checkpoint).model_copy(update={"length_buckets": buckets}),
        labels=labels, multi_label=multi_label, served=served,
    )  # fmt: skip
    tokenizer_files = {
        "model.py": ADAPTERS / "tokenizer" / "1" / "model.py",
        "tokenizer.json": checkpoint.path("tokenizer.json"),
    }
    own = {
        f"{spec.name}-tokenizer": (tokenizer_files, tokenizer),
        f"{spec.name}-encoder": _encoder_files(spec, platform, parts),
        spec.name: ({}, None),
    }
    return {
        name: ModelDirectory(to_pbtxt(config), *own.get(name, (_stage_files(name, parts), None)))
        for name, config in configs.items()
    }


def _encoder_files(
    spec: DeploymentSpec, platform: Platform, parts: Sequence[Part]
) -> tuple[dict[str, Path], Settings | None]:
    if platform == "gpu" and spec.parallel.tensor > 1:
        return _rank_plans(parts), None
    files = {file.name: part.path(file.name) for part in parts for file in part.files}
    files |= _records({part.file: part for part in parts if isinstance(part, Engine)})
    if platform == "gpu" and uses_tensorrt_backend(spec):
        return files, None
    return {**files, "model.py": ADAPTERS / "encoder" / "1" / "model.py"}, encoder_settings(spec, platform, parts)


def _rank_plans(parts: Sequence[Part]) -> dict[str, Path]:
    """Names of the backend's multi-device mode. It opens `model.plan` first, whatever the ranks have."""
    engines = {f"model.plan.rank{part.rank}": part for part in parts if isinstance(part, Engine)}
    plans = {name: engine.file_path for name, engine in engines.items()}
    return {**plans, "model.plan": plans["model.plan.rank0"], **_records(engines)}


def _stage_files(model: str, parts: Sequence[Part]) -> dict[str, Path]:
    """The engines of the stage that the model `<name>-stage<s>` runs, one for each target."""
    mine = [part for part in parts if isinstance(part, Engine) and model.endswith(f"-stage{part.stage}")]
    engines = {f"model.{part.target}.plan": part for part in mine}
    return {**{name: engine.file_path for name, engine in engines.items()}, **_records(engines)}


def _records(engines: dict[str, Engine]) -> dict[str, Path]:
    """The record of an engine lies beside it: flavour, version, target, profiles, seconds, digests."""
    return {f"{name}.json": engine.path("record.json") for name, engine in engines.items()}


def encoder_settings(spec: DeploymentSpec, platform: Platform, parts: Sequence[Part]) -> EncoderModelSettings:
    """What the Python backend's encoder is told; checks use the same, so that what is checked is what is served."""
    ranks = any(isinstance(part, RankFiles) for part in parts)
    return EncoderModelSettings(
        executor="tensorrt-rtx" if platform == "gpu" else "ranks" if ranks else spec.cpu_executor,
        files=_executor_files(parts),
        threads=spec.serving.threads,
        bfloat16=spec.precision.cpu in ("bf16", "int8"),
        # A GPU takes whole batches; the profile bounds them.
        tokens_per_batch=spec.serving.tokens_per_batch
        if platform == "cpu"
        else spec.serving.max_batch_size * spec.model.max_length,
        max_length=spec.model.max_length,
        warmup_lengths=spec.serving.length_buckets if spec.serving.warmup else (),
    )


def _executor_files(parts: Sequence[Part]) -> dict[str, str]:
    """The file that the executor opens, by target: `cpu`, or an SM such as `sm89`."""
    return {
        part.target if isinstance(part, Engine) else "cpu": MANIFEST if isinstance(part, RankFiles) else part.file
        for part in parts
    }


def _generator_directory(
    spec: DeploymentSpec,
    platform: Platform,
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    partition: Partition | None,
    served: ServedModel,
) -> dict[str, ModelDirectory]:
    files = {file.name: part.path(file.name) for part in parts for file in part.files}
    files |= _records({part.file: part for part in parts if isinstance(part, Engine)})
    files |= {
        "model.py": ADAPTERS / "generator" / "1" / "model.py",
        "tokenizer.json": checkpoint.path("tokenizer.json"),
    }
    # Ranks are processes of one instance, which takes GPUs from its own on; without ranks every GPU has an instance.
    gpus = (0,) if platform == "gpu" and spec.parallel.ranks > 1 else ()
    config = generator_config(spec.name, "KIND_CPU" if platform == "cpu" else "KIND_GPU", gpus)
    settings = generator_settings(spec, platform, checkpoint, parts, partition, served)
    return {spec.name: ModelDirectory(to_pbtxt(config), files, settings)}


def generator_settings(
    spec: DeploymentSpec,
    platform: Platform,
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    partition: Partition | None,
    served: ServedModel,
) -> GeneratorModelSettings:
    facts, chosen = checkpoint.generation, spec.generation
    assert facts is not None
    return GeneratorModelSettings(
        executor=spec.engine.flavour if platform == "gpu" else "ranks" if partition is not None else spec.cpu_executor,
        files=_generator_files(parts),
        threads=spec.serving.threads,
        capacities=spec.cache_lengths_on(platform),
        slots=chosen.slots,
        kept=chosen.kept_prefixes,
        chunk_tokens=chosen.chunk_tokens,
        queue_size=spec.serving.queue_size,
        stream_interval_s=chosen.stream_interval_ms / 1e3,
        timeout_s=chosen.request_timeout_s,
        max_length=spec.model.max_length,
        default_max_tokens=chosen.default_max_tokens,
        end_ids=facts.eos_ids,
        decoder_start_id=facts.start_id,
        rank_cache=_rank_cache(partition, facts.vocabulary) if platform == "cpu" and partition is not None else None,
        chat=chat_settings(checkpoint.directory),
        served=served,
    )


def _generator_files(parts: Sequence[Part]) -> dict[str, str]:
    """What the executor opens, by the keys of `GeneratorModelSettings.files`."""
    ranks = any(isinstance(part, RankFiles) for part in parts)  # their manifest names the engines
    found: dict[str, str] = {}
    for part in parts:
        if isinstance(part, Engine):
            if not ranks:
                found[f"{part.target}.{part.capacity or 'encoder'}"] = part.file
        elif isinstance(part, RankFiles):
            engines = any(file.name == ENGINES for file in part.files)
            found |= {"engines": ENGINES} if engines else {"ranks": MANIFEST}
        else:
            found["decoder"] = part.file
            if any(file.name == ENCODER_FILE for file in part.files):
                found["encoder"] = ENCODER_FILE
    return found


def _rank_cache(partition: Partition, vocabulary: int) -> RankCacheSettings:
    """The shape of a cache on one rank, the same in every layer: [batch, heads, capacity, head_dim]."""
    states = {given for _, given in partition.states}
    port = next(port for stage in partition.stages for port in stage.inputs if port.name in states)
    _, heads, _, head_dim = port.dims
    return RankCacheSettings(heads=heads, head_dim=head_dim, dtype=port.dtype, vocabulary=vocabulary)


def require_gpu_executor(spec: DeploymentSpec) -> None:
    """Raises UnsupportedError for generators that no GPU executor runs; ranks of encoder-decoders no spec has."""
    if spec.parallel.tensor > 1 and spec.engine.flavour == "tensorrt-rtx":
        raise UnsupportedError(
            "engine.flavour", got=f"tensorrt-rtx with {spec.parallel.tensor} tensor ranks",
            expected="TensorRT for collectives: TensorRT for RTX runs on one GPU",
            fix="set engine.flavour: tensorrt, or use pipeline stages",
        )  # fmt: skip
