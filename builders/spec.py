"""`DeploymentSpec`: everything a user decides about one deployment, in one YAML file.

The spec is composed of slices. A stage is handed its own slice only, so its cache key holds nothing else.
Unknown keys are refused, values are frozen, and units stand in the names.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from builders.errors import SpecError

Platform = Literal["cpu", "gpu"]
Task = Literal["embedding", "classification", "reranking"]
GraphPrecision = Literal["fp32", "fp16", "int8"]
Flavour = Literal["tensorrt", "tensorrt-rtx"]

PRESETS = Path(__file__).parent / "presets"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$")]
SmTarget = Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Slice(BaseModel):
    """A part of the spec: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSlice(Slice):
    """What is served."""

    source: str = Field(description="`packaged:all-MiniLM-L6-v2`, a local folder, or a Hugging Face id (`org/model`)")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    task: Task
    max_length: Annotated[int, Field(ge=8)] = Field(
        256, description="tokens, special ones included; longer text is truncated and reported as such"
    )
    pooling: Literal["mean", "cls"] | None = Field(None, description="embedding only; default: the checkpoint's own")
    normalize: bool | None = Field(None, description="embedding only, L2; default: the checkpoint's own")
    allow_pickle: bool = Field(False, description="load *.bin weights, which can run code on this machine")


class CompressSlice(Slice):
    """Techniques that change the weights before export. None exists yet, so no key is accepted."""


class PrecisionSlice(Slice):
    """Numbers that the graph computes in, and the quality that must remain."""

    cpu: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="bf16: the fp32 graph, computed in bfloat16 by OpenVINO where the CPU has it"
    )
    gpu: Literal["fp16", "int8"] = "fp16"
    min_mean_cosine: Fraction = Field(0.998, description="against the fp32 model, mean over held-out texts")
    min_worst_cosine: Fraction = Field(0.98, description="against the fp32 model, the worst held-out text")
    calibration_texts: Path | None = Field(
        None, description="UTF-8 file, one text a line; default: docstrings of Python's standard library"
    )
    calibration_samples: Annotated[int, Field(ge=8, le=4096)] = 128


class ParallelSlice(Slice):
    """Ranks per replica."""

    tensor: Positive = 1
    pipeline: Positive = 1


class Range(Slice):
    """Smallest, most usual and largest size of one dynamic dimension."""

    min: Positive
    opt: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min <= opt <= max does not hold for {self.min}, {self.opt}, {self.max}")
        return self

    def holds(self, low: int, high: int) -> bool:
        return self.min <= low and high <= self.max


class ProfileSlice(Slice):
    """One TensorRT optimisation profile: sequences per batch, tokens per sequence."""

    batch: Range
    length: Range


class EngineSlice(Slice):
    """What TensorRT builds. `targets` are streaming-multiprocessor versions: sm89 is an L4 or an RTX 4090."""

    flavour: Flavour = "tensorrt-rtx"
    targets: Annotated[tuple[SmTarget, ...], Field(min_length=1)] = ("sm89",)
    profiles: Annotated[tuple[ProfileSlice, ...], Field(min_length=1)] = (
        ProfileSlice(batch=Range(min=1, opt=8, max=32), length=Range(min=1, opt=64, max=256)),
    )


class RateLimitSlice(Slice):
    """Triton rate limiter: an execution holds `count` units of `resource` while it runs."""

    resource: str
    count: Positive = 1
    priority: Positive = 1


class ServingSlice(Slice):
    """How Triton schedules and runs the model."""

    executor: Literal["openvino", "onnxruntime"] = Field("openvino", description="CPU only")
    max_batch_size: Positive = Field(32, description="sequences in one execution, and texts in one request")
    length_buckets: tuple[Positive, ...] = Field(
        (16, 32, 64, 128, 256), description="GPU: sequences are padded to the next of these token counts"
    )
    tokens_per_batch: Positive = Field(
        512, description="CPU: a ragged batch is sorted and split so that a part holds at most this many padded tokens"
    )
    instances: Positive = 1
    threads: Positive | None = Field(None, description="CPU threads of one instance; default: every core")
    queue_size: Positive = 256
    queue_delay_us: NotNegative = 1000
    queue_timeout_us: NotNegative = Field(2_000_000, description="0: wait without limit")
    response_cache_bytes: NotNegative = Field(0, description="0: off; Triton wants at least 1 MiB")
    warmup: bool = True
    rate_limit: RateLimitSlice | None = None


class KubernetesSlice(Slice):
    """Deployment to a cluster. Manifests do not exist yet, so no key is accepted."""


class SloSlice(Slice):
    """What a load test must show. A missed value makes `trireme loadtest` exit 1."""

    p95_latency_ms: Annotated[float, Field(gt=0)] | None = None
    min_throughput_per_s: Annotated[float, Field(gt=0)] | None = None
    max_error_rate: Fraction = 0.0


class DeploymentSpec(Slice):
    """One deployment, from checkpoint to service."""

    name: Name
    model: ModelSlice
    compress: CompressSlice = CompressSlice()
    precision: PrecisionSlice = PrecisionSlice()
    parallel: ParallelSlice = ParallelSlice()
    engine: EngineSlice = EngineSlice()
    serving: ServingSlice = ServingSlice()
    kubernetes: KubernetesSlice = KubernetesSlice()
    slo: SloSlice = SloSlice()

    @model_validator(mode="after")
    def _coherent(self) -> DeploymentSpec:
        buckets, longest = self.serving.length_buckets, self.model.max_length
        if list(buckets) != sorted(set(buckets)):
            raise ValueError(f"serving.length_buckets={list(buckets)} must rise strictly")
        if not buckets or buckets[-1] != longest:
            raise ValueError(
                f"serving.length_buckets={list(buckets)} must end with model.max_length={longest}, "
                "or the longest texts fit no bucket"
            )
        for length in buckets:
            self._require_profile(length)
        if self.engine.flavour == "tensorrt-rtx" and len(self.engine.profiles) > 1:
            raise ValueError("engine.profiles: engines of flavour tensorrt-rtx are served with one profile; give one")
        if self.model.task != "embedding" and (self.model.pooling or self.model.normalize is not None):
            raise ValueError(f"model.pooling and model.normalize apply to task embedding, not {self.model.task}")
        if self.precision.cpu == "bf16" and self.serving.executor == "onnxruntime":
            raise ValueError("precision.cpu=bf16 needs serving.executor=openvino; ONNX Runtime computes in fp32 on CPU")
        if 0 < self.serving.response_cache_bytes < 1 << 20:
            raise ValueError(
                f"serving.response_cache_bytes={self.serving.response_cache_bytes} is under Triton's minimum of 1048576"
            )
        return self

    def _require_profile(self, length: int) -> None:
        """Every batch that Triton may form must lie inside one optimisation profile."""
        batch = self.serving.max_batch_size
        if any(p.batch.holds(1, batch) and p.length.holds(length, length) for p in self.engine.profiles):
            return
        allowed = "; ".join(
            f"batch {p.batch.min}..{p.batch.max} x length {p.length.min}..{p.length.max}" for p in self.engine.profiles
        )
        raise ValueError(
            f"serving.max_batch_size={batch} x length {length} fits no engine.profiles entry ({allowed}); "
            "widen a profile, or lower max_batch_size or model.max_length"
        )

    def precision_on(self, platform: Platform) -> Literal["fp32", "bf16", "fp16", "int8"]:
        """What the platform serves."""
        return self.precision.cpu if platform == "cpu" else self.precision.gpu

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the whole spec."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class _StrictLoader(yaml.SafeLoader):
    """YAML without the silent loss of a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise SpecError(
                    f"{self.name}, line {key.start_mark.line + 1}",
                    got=f"the key {key.value!r} twice",
                    expected="each key once",
                    fix="remove one of the two",
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def resolve_spec_path(argument: str) -> Path:
    """A path as given, or the name of a preset (`minilm`)."""
    path = Path(argument)
    preset = PRESETS / f"{argument}.yaml"
    if not path.is_file() and preset.is_file():
        return preset
    return path


def load_spec(argument: str | Path) -> DeploymentSpec:
    """Reads a spec file or a preset. Relative paths inside it are taken from the file's own folder.

    Raises SpecError: no such file, not YAML, not a mapping, unknown key, wrong type, impossible combination.
    """
    path = resolve_spec_path(str(argument))
    try:
        with path.open(encoding="utf-8") as stream:
            data = yaml.load(stream, Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise SpecError(
            f"spec {path}",
            got=_reason(error),
            expected="a readable YAML file",
            fix=f"check the path, or use: {presets}",
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise SpecError(
            f"spec {path}", got=" ".join(str(error).split()), expected="valid YAML", fix="mend the line named above"
        ) from error
    if not isinstance(data, dict):
        raise SpecError(
            f"spec {path}", got=type(data).__name__, expected="a mapping", fix="start from builders/presets/minilm.yaml"
        )
    try:
        spec = DeploymentSpec.model_validate(data)
    except ValidationError as error:
        raise _spec_error(path, error) from error
    return _anchor_paths(spec, path.resolve().parent)


def _anchor_paths(spec: DeploymentSpec, folder: Path) -> DeploymentSpec:
    texts = spec.precision.calibration_texts
    if texts is not None and not texts.is_absolute():
        spec = spec.model_copy(
            update={"precision": spec.precision.model_copy(update={"calibration_texts": folder / texts})}
        )
    source = folder / spec.model.source
    if spec.model.source.startswith(".") and source.is_dir():
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": str(source.resolve())})})
    return spec


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _spec_error(path: Path, error: ValidationError) -> SpecError:
    """The first faults of a validation, in the user's terms: key path, value, what would be right."""
    faults = error.errors()
    first = faults[0]
    key = ".".join(str(part) for part in first["loc"]) or "the spec as a whole"
    more = f" (and {len(faults) - 1} more: {', '.join(_key(f) for f in faults[1:5])})" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else "remove the key"
        expected = f"one of {', '.join(known)}" if known else "no key here yet"
        return SpecError(f"{path}: {key}", got="an unknown key" + more, expected=expected, fix=fix)
    if first["type"] == "missing":
        return SpecError(f"{path}: {key}", got="nothing" + more, expected="a value", fix=f"add {key}")
    if not first["loc"]:
        message = first["msg"].removeprefix("Value error, ")
        return SpecError(f"{path}", got=message, expected="a combination that can be served", fix="change one of these")
    return SpecError(
        f"{path}: {key}",
        got=repr(first["input"]) + more,
        expected=first["msg"].removeprefix("Value error, "),
        fix=f"correct {key}",
    )


def _key(fault: Any) -> str:
    return ".".join(str(part) for part in fault["loc"])


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the slice at `location`, looked up in the types themselves."""
    slice_type: Any = DeploymentSpec
    for part in location:
        if isinstance(part, int):
            continue
        annotation = slice_type.model_fields[part].annotation
        slice_type = next((t for t in _flatten(annotation) if isinstance(t, type) and issubclass(t, Slice)), None)
        if slice_type is None:
            return []
    return sorted(slice_type.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    return [annotation, *(inner for argument in get_args(annotation) for inner in _flatten(argument))]
