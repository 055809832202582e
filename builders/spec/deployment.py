"""`DeploymentSpec`: everything a user decides about one deployment, and what must agree among its slices."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field, model_validator

from builders.spec.compress import BudgetSlice, StepSlice
from builders.spec.kubernetes import KubernetesSlice
from builders.spec.online import OnlineSlice
from builders.spec.slices import (
    FP8_TARGET,
    CpuPrecision,
    EngineSlice,
    GenerationSlice,
    GraphPrecision,
    ModelSlice,
    Name,
    ParallelSlice,
    Platform,
    PrecisionSlice,
    ProfileSlice,
    Range,
    ServingSlice,
    Slice,
    SloSlice,
)

GENERATES = ("generation", "seq2seq")
# Keys that a kind of model does not read, by slice; an empty tuple: none of the slice.
UNREAD: dict[str, dict[str, tuple[str, ...]]] = {
    "encoder": {
        "generation": (), "precision": ("max_perplexity_ratio",),
        "slo": ("p99_first_token_ms", "p99_response_gap_ms", "p99_inter_token_ms", "min_output_tokens_per_s"),
    },
    "embedding": {"precision": ("max_logit_error",)},
    "generator": {
        "precision": ("min_mean_cosine", "min_worst_cosine", "max_logit_error", "qat"),
        "engine": ("profiles",),
        "serving": (
            "max_batch_size", "length_buckets", "tokens_per_batch", "instances", "queue_delay_us", "queue_timeout_us",
            "response_cache_bytes", "warmup", "rate_limit",
        ),
    },
}  # fmt: skip
_BUDGET_OF_GENERATION = ("max_perplexity_ratio", "min_agreement")
_BUDGET_OF_OTHERS = ("min_mean_cosine", "min_worst_cosine", "min_mrr_ratio")
_ENCODER_PRECISIONS = {
    "cpu": ("auto", "fp32", "bf16", "int8", "dynamic_int8", "w8", "w4"), "gpu": ("fp16", "int8", "fp8"),
}  # fmt: skip
# No w8 on a GPU: TensorRT for RTX keeps weights in 4 bits, but unpacks those in 8. Of a 100 M Llama it makes an engine
# of 211 MB from fp16, 151 MB from w4, and 217 (a scale for each channel) to 270 MB (for each block) from w8.
_GENERATOR_PRECISIONS = {"cpu": ("auto", "fp32", "w8", "w4"), "gpu": ("fp16", "w4")}


class DeploymentSpec(Slice):
    """One deployment, from checkpoint to service."""

    name: Name = Field(
        description="of the model as clients ask for it: lower-case letters, digits and dashes, 42 characters at most"
    )
    model: ModelSlice
    compress: tuple[StepSlice, ...] = Field((), description="techniques that make the model smaller, in their order")
    budget: BudgetSlice | None = Field(None, description="what compress must leave of the original")
    precision: PrecisionSlice = PrecisionSlice()
    parallel: ParallelSlice = ParallelSlice()
    engine: EngineSlice = EngineSlice()
    serving: ServingSlice = ServingSlice()
    generation: GenerationSlice = GenerationSlice()
    kubernetes: KubernetesSlice = KubernetesSlice()
    slo: SloSlice = SloSlice()
    online: OnlineSlice | None = None

    @model_validator(mode="after")
    def _coherent(self) -> DeploymentSpec:
        precisions = _GENERATOR_PRECISIONS if self.generates else _ENCODER_PRECISIONS
        for platform, chosen in (("cpu", self.precision.cpu), ("gpu", self.precision.gpu)):
            if chosen not in precisions[platform]:
                raise ValueError(
                    f"precision.{platform}={chosen} does not go with model.task={self.model.task}; "
                    f"use one of {', '.join(precisions[platform])}"
                )
        self._require_read_keys()
        self._require_rounded()
        self._require_compressible()
        if self.online is not None:
            self.online.require_task(self.model.task, self.model.max_length)
        if self.generates:
            self._require_cache_lengths()
        else:
            self._require_encoder_choices()
        of_embeddings = (self.model.pooling, self.model.normalize, self.model.prompt_name)
        if self.model.task != "embedding" and of_embeddings != (None, None, None):
            raise ValueError(
                f"model.pooling, model.normalize and model.prompt_name apply to task embedding, not {self.model.task}"
            )
        return self

    def _require_read_keys(self) -> None:
        """A key that the task does not read must not look as if it did something."""
        kinds = ("generator",) if self.generates else ("encoder", self.model.task)
        for slice_name, keys in (item for kind in kinds for item in UNREAD.get(kind, {}).items()):
            given: Slice = getattr(self, slice_name)
            unused = type(given)()
            for key in keys or type(given).model_fields:
                value = getattr(given, key)
                if value != getattr(unused, key):
                    raise ValueError(
                        f"{slice_name}.{key}={value} says nothing to model.task={self.model.task}; remove it"
                    )

    def _require_rounded(self) -> None:
        """What is said of integers is said of a graph that has some."""
        asked, served = self.precision, {self.precision.cpu, self.precision.gpu}
        if asked.qat is not None and not served & {"int8", "w4", "auto"}:
            raise ValueError(
                f"precision.qat says nothing to precision.cpu={asked.cpu} and precision.gpu={asked.gpu}: it is for "
                "graphs in int8 or w4; use one of them, or remove it"
            )
        if asked.qat is not None and "awq" in asked.rounding:
            raise ValueError(
                f"precision.rounding={asked.rounding} scales weights, so that precision.qat does not know them again; "
                "use gptq, or leave one of the two out"
            )
        if asked.qat is not None and asked.blocks == "asymmetric":
            raise ValueError("precision.blocks=asymmetric: precision.qat trains no zero points; use symmetric")
        for key in ("blocks", "ranges"):
            value = getattr(asked, key)
            if value != getattr(PrecisionSlice(), key) and not (served & {"w8", "w4"} or self._may_be_rounded):
                raise ValueError(
                    f"precision.{key}={value} says nothing to precision.cpu={asked.cpu} and precision.gpu={asked.gpu}: "
                    "it is for weights alone; use w8 or w4, or remove it"
                )
        if asked.blocks == "asymmetric" and asked.gpu == "w4":
            raise ValueError("precision.blocks=asymmetric: TensorRT takes no zero points of precision.gpu=w4")
        in_int8 = not self.generates and bool(served & {"int8", "dynamic_int8", "auto"})
        if asked.rounding != "auto" and not (in_int8 or served & {"auto", "w8", "w4"}):
            integers = "w8 or w4" if self.generates else "int8, dynamic_int8, w8 or w4"
            raise ValueError(
                f"precision.rounding says nothing to precision.cpu={asked.cpu} and precision.gpu={asked.gpu}: it is "
                f"for weights in integers; use {integers}, or remove it"
            )
        if in_int8 and "awq" in asked.rounding:
            raise ValueError(
                f"precision.rounding={asked.rounding} is for weights alone (w8, w4); INT8 graphs scale their inputs by "
                "SmoothQuant: use nearest or gptq, or precision.cpu w8 or w4"
            )

    @property
    def _may_be_rounded(self) -> bool:
        """Language models with `auto` may come to w8 or w4."""
        return self.generates and self.precision.cpu == "auto"

    def _require_compressible(self) -> None:
        """Techniques for a kind of model that they are built for, and a budget for something."""
        if self.budget is not None and not self.compress:
            raise ValueError("budget says nothing without steps of compress; precision has a budget of its own")
        if self.compress and self.model.task == "seq2seq":
            raise ValueError("compress is built for encoders and for model.task=generation, not for seq2seq; remove it")
        unread = _BUDGET_OF_OTHERS if self.generates else _BUDGET_OF_GENERATION
        for key in (key for key in unread if getattr(self.compress_budget, key) != getattr(BudgetSlice(), key)):
            raise ValueError(f"budget.{key} says nothing to model.task={self.model.task}; remove it")
        if self.compress_budget.min_mrr_ratio is not None and self.model.task != "embedding":
            raise ValueError(f"budget.min_mrr_ratio says nothing to model.task={self.model.task}; remove it")
        for step in self.compress:
            if step.prune is not None and step.prune.labels is not None and self.model.task != "classification":
                raise ValueError(
                    f"prune.importance=taylor needs labelled texts of a classifier, not of model.task="
                    f"{self.model.task}; use gauss_newton"
                )

    def _require_cache_lengths(self) -> None:
        lengths, longest = self.cache_lengths_on("cpu"), self.model.max_length
        if list(lengths) != sorted(set(lengths)) or lengths[-1] != longest:
            raise ValueError(
                f"generation.cache_lengths={list(lengths)} must rise strictly and end with model.max_length={longest}: "
                "prompt and output together fit the longest row"
            )
        if self.model.task == "seq2seq":
            if self.parallel.ranks > 1:
                raise ValueError("parallel: encoder-decoders are not shared out to ranks; use replicas")
            if self.serving.executor == "openvino":
                raise ValueError("serving.executor=openvino: encoder-decoders run on onnxruntime")
        self._require_rank_executor()

    @property
    def generates(self) -> bool:
        return self.model.task in GENERATES

    @property
    def compress_budget(self) -> BudgetSlice:
        return self.budget or BudgetSlice()

    @property
    def cpu_executor(self) -> Literal["openvino", "onnxruntime"]:
        """What runs on CPU: OpenVINO is faster, ONNX Runtime takes everything."""
        if self.serving.executor is not None:
            return self.serving.executor
        return "onnxruntime" if self.parallel.ranks > 1 or self.model.task == "seq2seq" else "openvino"

    def cache_lengths_on(self, platform: Platform) -> tuple[int, ...]:
        """Of the cache's rows, in tokens. A row moves to the next length when it outgrows its own.

        There is one length unless the spec says more on a GPU, where every length is an engine with its own copy of the
        weights, and on OpenVINO, where a step reads what a row holds. ONNX Runtime reads whole rows.
        """
        from runtime.generation.cache import capacity_ladder

        if self.generation.cache_lengths is not None:
            return self.generation.cache_lengths
        longest = self.model.max_length
        return capacity_ladder(longest) if platform == "cpu" and self.cpu_executor == "onnxruntime" else (longest,)

    def _require_encoder_choices(self) -> None:
        buckets, longest = self.serving.length_buckets, self.model.max_length
        if list(buckets) != sorted(set(buckets)):
            raise ValueError(f"serving.length_buckets={list(buckets)} must rise strictly")
        if not buckets or buckets[-1] != longest:
            raise ValueError(
                f"serving.length_buckets={list(buckets)} must end with model.max_length={longest}, "
                "or the longest texts fit no bucket"
            )
        self.require_profiles()
        if self.engine.flavour == "tensorrt-rtx" and len(self.engine.profiles) > 1:
            raise ValueError("engine.profiles: engines of flavour tensorrt-rtx are served with one profile; give one")
        if self.precision.cpu == "bf16" and self.cpu_executor == "onnxruntime":
            raise ValueError("precision.cpu=bf16 needs serving.executor=openvino; ONNX Runtime computes in fp32 on CPU")
        self._require_quantised_choices()
        self._require_rank_choices()
        if 0 < self.serving.response_cache_bytes < 1 << 20:
            raise ValueError(
                f"serving.response_cache_bytes={self.serving.response_cache_bytes} is under Triton's minimum of 1048576"
            )

    def _require_quantised_choices(self) -> None:
        """Where dynamic INT8 and FP8 run."""
        if self.precision.cpu == "dynamic_int8":
            if self.parallel.ranks > 1:
                raise ValueError(
                    "precision.cpu=dynamic_int8 does not go with parallel: a rank would scale by its own share of an "
                    "activation; use fp32 or int8"
                )
            if self.cpu_executor != "onnxruntime":
                raise ValueError(
                    "precision.cpu=dynamic_int8 needs serving.executor=onnxruntime: OpenVINO takes longer for it than "
                    "for fp32; use int8 there"
                )
        old = [target for target in self.engine.targets if int(target.removeprefix("sm")) < FP8_TARGET]
        if self.precision.gpu == "fp8" and old:
            raise ValueError(
                f"precision.gpu=fp8 needs engine.targets of sm{FP8_TARGET} or newer, and {', '.join(old)} does not "
                "multiply FP8; use int8 or fp16 there"
            )

    def _require_rank_choices(self) -> None:
        """What ranks cannot do: the CPU's run pieces of the graph on ONNX Runtime, the GPU's have one engine each."""
        self._require_rank_executor()
        if self.parallel.tensor > 1 and (len(self.engine.profiles) > 1 or len(self.engine.targets) > 1):
            raise ValueError(
                f"parallel.tensor={self.parallel.tensor}: Triton's tensorrt backend takes engines of several ranks for "
                "one GPU type and with one profile; give one of engine.targets and one of engine.profiles"
            )

    def _require_rank_executor(self) -> None:
        if self.parallel.ranks > 1 and self.cpu_executor == "openvino":
            raise ValueError(
                f"parallel={self.parallel.tensor} x {self.parallel.pipeline} needs serving.executor=onnxruntime: "
                "it runs the pieces of a rank's graph on CPU"
            )

    def require_profiles(self) -> None:
        """Every batch that Triton may form on a GPU must lie inside one optimisation profile. Raises ValueError."""
        profiles, batch = self.engine_profiles, self.serving.max_batch_size
        for length in self.serving.length_buckets:
            if any(p.batch.holds(1, batch) and p.length.holds(length, length) for p in profiles):
                continue
            allowed = "; ".join(
                f"batch {p.batch.min}..{p.batch.max} x length {p.length.min}..{p.length.max}" for p in profiles
            )
            raise ValueError(
                f"serving.max_batch_size={batch} x length {length} fits no engine.profiles entry ({allowed}); "
                "widen a profile, or lower max_batch_size or model.max_length"
            )

    @property
    def engine_profiles(self) -> tuple[ProfileSlice, ...]:
        """The spec's own, or one that holds every batch that can be served."""
        if self.engine.profiles:
            return self.engine.profiles
        batch, length = self.serving.max_batch_size, self.model.max_length
        return (
            ProfileSlice(
                batch=Range(min=1, opt=min(8, batch), max=batch), length=Range(min=1, opt=min(64, length), max=length)
            ),
        )

    def precision_on(self, platform: Platform) -> CpuPrecision | GraphPrecision:
        """What the platform serves. Raises ValueError for `auto` that no build has measured yet."""
        chosen = self.precision.cpu if platform == "cpu" else self.precision.gpu
        if chosen == "auto":
            raise ValueError("precision.cpu=auto: measure it first, then `with_cpu_precision`")
        return chosen

    def instances_on(self, platform: Platform) -> int:
        return self.serving.instances or (1 if platform == "cpu" else 2)

    def with_cpu_precision(self, chosen: CpuPrecision) -> DeploymentSpec:
        return self.model_copy(update={"precision": self.precision.model_copy(update={"cpu": chosen})})

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of what is served; where and how many times, and how well, is left out."""
        content = self.model_dump(mode="json", exclude={"kubernetes", "slo", "budget", "online"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
