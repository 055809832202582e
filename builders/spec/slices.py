"""The slices of the spec. A stage is handed its own slice only, so its cache key holds nothing else.

Unknown keys are refused, values are frozen, and units stand in the names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Platform = Literal["cpu", "gpu"]
Task = Literal["embedding", "classification", "reranking", "generation", "seq2seq"]
GraphPrecision = Literal["fp32", "fp16", "int8", "dynamic_int8", "fp8", "w8", "w4"]
CpuPrecision = Literal["fp32", "bf16", "int8", "dynamic_int8", "w8", "w4"]
FP8_TARGET = 89  # the first multiprocessors that multiply FP8: Ada, then Hopper and Blackwell
WeightRounder = Literal["nearest", "gptq", "awq", "awq+gptq"]
Rounding = Literal["auto", WeightRounder]
Flavour = Literal["tensorrt", "tensorrt-rtx"]
Pooling = Literal["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$")]
SmTarget = Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Slice(BaseModel):
    """A part of the spec: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSlice(Slice):
    """What is served."""

    source: str = Field(
        description="`packaged:all-MiniLM-L6-v2`, a folder (`./…` counts from the spec's), or a Hugging Face id "
        "(`org/model`)"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    task: Task = Field(
        description="embedding: a vector for each text. classification: scores for each text. reranking: scores for a "
        "pair of texts. generation: a language model. seq2seq: an encoder-decoder such as T5"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        256,
        description="tokens, special ones included; longer text is truncated and reported as such. Generation: prompt "
        "and output together; a longer prompt is refused",
    )
    pooling: Pooling | None = Field(None, description="embedding only; default: the checkpoint's own")
    normalize: bool | None = Field(None, description="embedding only, L2; default: the checkpoint's own")
    prompt_name: str | None = Field(
        None,
        description="embedding only: the checkpoint's prompt that is put before each text, unless a request names "
        "another; '': none; default: the checkpoint's own default",
    )
    allow_pickle: bool = Field(False, description="load *.bin weights, which can run code on this machine")


class QatSlice(Slice):
    """Quantisation-aware training: the numbers of a quantised graph, trained towards the model that it was made of."""

    minutes: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None, description="of training on all threads of this machine, by CPU time: a busy machine takes longer"
    )
    tokens: Positive | None = Field(
        None, description="that it is trained on, in all passes; with tokens alone, a run can be repeated"
    )
    text_tokens: Positive = Field(
        200_000,
        description="of text at most, passed over again and again; fp32's states of it take 2 bytes a number on disk",
    )
    batch_tokens: Annotated[int, Field(ge=16)] = Field(1024, description="in a batch, of texts of like length")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="at its height, of AdamW: it rises over a twentieth of the training, then falls to 0; default: "
        "0.00003 in int8, 0.0001 in w4",
    )
    seed: NotNegative = Field(0, description="of the order of the batches")

    @model_validator(mode="after")
    def _bounded(self) -> QatSlice:
        if self.minutes is None and self.tokens is None:
            raise ValueError("minutes or tokens is needed to say how long it is trained")
        return self


class PrecisionSlice(Slice):
    """Numbers that the graph computes in, and the quality that must remain."""

    cpu: CpuPrecision | Literal["auto"] = Field(
        "auto",
        description="auto: the fastest within the budget, measured on the CPU that builds. Encoders: fp32, bf16 (the "
        "fp32 graph, computed in bfloat16 by OpenVINO where the CPU has it), int8, or dynamic_int8 (with the scales of "
        "each batch, on ONNX Runtime); language models: fp32, or weights alone in 8 or 4 bits (w8, w4). These are for "
        "encoders too, by name: smaller files, seldom faster",
    )
    gpu: Literal["fp16", "int8", "fp8", "w4"] = Field(
        "fp16",
        description="encoders: fp16, int8, or fp8 (E4M3, for sm89 and newer); language models: fp16, or weights alone "
        "in 4 bits (w4)",
    )
    min_mean_cosine: Fraction = Field(0.998, description="least cosine to the fp32 model, mean over held-out texts")
    min_worst_cosine: Fraction = Field(0.98, description="least cosine to the fp32 model, of the worst held-out text")
    max_logit_error: Annotated[float, Field(gt=0)] = Field(
        0.2,
        description="root mean square difference to the fp32 model's logits, over their "
        "spread; 0.2 is what noise alone makes of a correlation of 0.98, the default of min_worst_cosine",
    )
    max_perplexity_ratio: Annotated[float, Field(ge=1)] = Field(
        1.03, description="perplexity on held-out texts, over that of the fp32 model"
    )
    calibration_texts: Path | None = Field(
        None, description="UTF-8 file, one text a line; default: docstrings of Python's standard library"
    )
    calibration_samples: Annotated[int, Field(ge=8, le=4096)] = Field(
        128, description="texts to calibrate with; those that judge the result come after them and are others"
    )
    rounding: Rounding = Field(
        "auto",
        description="int8, dynamic_int8, w8, w4: weights to the nearest step; gptq, so that later weights make up for "
        "earlier ones on the calibration texts; w8, w4: awq, after their inputs were scaled where that costs nothing; "
        "or both. auto: what is nearest to fp32 on those of them that it does not see (w8: to the nearest)",
    )
    blocks: Literal["symmetric", "asymmetric"] = Field(
        "symmetric",
        description="w8, w4 on a CPU: a block's range lies evenly around 0; or it is that of its weights, with a zero "
        "point, which TensorRT does not take",
    )
    ranges: Literal["auto", "minmax", "mse"] = Field(
        "auto",
        description="w8, w4: minmax: of all weights of a block; mse: less, where the squared error gets smaller. auto: "
        "mse in 4 bits, minmax in 8",
    )
    qat: QatSlice | None = Field(
        None, description="encoders in int8 or w4: the graph is trained before it is judged; off unless given"
    )


class ParallelSlice(Slice):
    """Ranks per replica: `tensor` of them share each layer, `pipeline` stages follow each other."""

    tensor: Positive = Field(1, description="ranks that share each layer")
    pipeline: Positive = Field(1, description="stages that follow each other, each with its share of the layers")

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline


class Range(Slice):
    """Smallest, most usual and largest size of one dynamic dimension."""

    min: Positive = Field(description="smallest size")
    opt: Positive = Field(description="size that the engine is tuned for")
    max: Positive = Field(description="largest size")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min <= opt <= max does not hold for {self.min}, {self.opt}, {self.max}")
        return self

    def holds(self, low: int, high: int) -> bool:
        return self.min <= low and high <= self.max


class ProfileSlice(Slice):
    """One TensorRT optimisation profile: sequences per batch, tokens per sequence."""

    batch: Range = Field(description="texts in a batch: `{min: 1, opt: 16, max: 64}`")
    length: Range = Field(description="tokens in a text, given the same way")


class EngineSlice(Slice):
    """What TensorRT builds. `targets` are streaming-multiprocessor versions: sm89 is an L4 or an RTX 4090."""

    flavour: Flavour = Field(
        "tensorrt-rtx",
        description="tensorrt-rtx builds without a GPU and is served by the Python backend; tensorrt builds on the GPU "
        "and is what Triton's own tensorrt backend and tensor ranks need",
    )
    targets: Annotated[tuple[SmTarget, ...], Field(min_length=1)] = Field(
        ("sm89",), description="GPU types, as the version of their multiprocessors: sm80 is an A100, sm89 an L4"
    )
    profiles: tuple[ProfileSlice, ...] = Field(
        (), description="default: one that holds batches to serving.max_batch_size and lengths to model.max_length"
    )


class RateLimitSlice(Slice):
    """Triton rate limiter: an execution holds `count` units of `resource` while it runs."""

    resource: str = Field(description="any name; models that give the same name share its units")
    count: Positive = Field(1, description="units that one execution holds")
    priority: Positive = Field(1, description="Triton's: an instance of priority 2 gets half the turns of one of 1")


class ServingSlice(Slice):
    """How Triton schedules and runs the model."""

    executor: Literal["openvino", "onnxruntime"] | None = Field(
        None, description="CPU only; default: openvino, or onnxruntime for ranks and encoder-decoders"
    )
    max_batch_size: Positive = Field(32, description="sequences in one execution, and texts in one request")
    length_buckets: tuple[Positive, ...] = Field(
        (16, 32, 64, 128, 256),
        description="GPU: texts are padded to the next of these token counts; the last is model.max_length",
    )
    tokens_per_batch: Positive = Field(
        512,
        description="CPU: a batch is sorted by length and split into parts of at most this many tokens, "
        "padding counted",
    )
    instances: Positive | None = Field(
        None,
        description="copies of the encoder on a machine, or on each GPU. Default: 1 on a CPU, which shares its cores "
        "out best when it knows of all work; 2 on a GPU, where one computes while the other answers",
    )
    threads: Positive | None = Field(None, description="CPU threads of one instance; default: every core")
    queue_size: Positive = Field(
        256, description="requests that may wait; one more is refused (429), an encoder's by the gateway"
    )
    queue_delay_us: NotNegative = Field(1000, description="how long a request may wait for others to share its batch")
    queue_timeout_us: NotNegative = Field(
        0,
        description="a request that has waited so long is refused with UNAVAILABLE; 0: no limit. With a limit "
        "Triton 2.51 lets requests wait half a second now and then (docs/triton.md)",
    )
    response_cache_bytes: NotNegative = Field(
        0, description="memory for answers to texts that come again; at least 1048576, or 0: off"
    )
    warmup: bool = Field(True, description="run every length of length_buckets before the server is ready")
    rate_limit: RateLimitSlice | None = Field(None, description="Triton's rate limiter; off unless given")


class GenerationSlice(Slice):
    """How a language model runs: rows of a key-value cache, and who waits for whom."""

    slots: Positive = Field(16, description="sequences that run at once")
    kept_prefixes: Positive = Field(8, description="ended sequences whose cache stays for others that begin alike")
    cache_lengths: tuple[Positive, ...] | None = Field(
        None,
        description="lengths in tokens that a row of the cache may have, rising to model.max_length. Default: "
        "128, 192, 256 … model.max_length on ONNX Runtime; elsewhere model.max_length alone",
    )
    chunk_tokens: Annotated[int, Field(ge=16)] = Field(
        128, description="tokens of a long prompt that one step reads, so that running streams go on"
    )
    stream_interval_ms: NotNegative = Field(
        40,
        description="tokens of a stream that come within this time are sent together, the first at once; 0: each by "
        "itself",
    )
    default_max_tokens: Positive = Field(128, description="new tokens of a request that names no max_tokens")
    request_timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="time that a request has, unless it brings its own; default: no limit"
    )


class SloSlice(Slice):
    """What a load test must show. A missed value makes `trireme loadtest` exit 1. Limits on times are over all
    requests, and one that failed counts as later than any answer.
    """

    p95_latency_ms: Annotated[float, Field(gt=0)] | None = Field(None, description="of the whole answer")
    min_throughput_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="texts a second; of a language model: requests a second"
    )
    p99_first_token_ms: Annotated[float, Field(gt=0)] | None = Field(
        None, description="from the request to its first token"
    )
    p99_response_gap_ms: Annotated[float, Field(gt=0)] | None = Field(
        None, description="between two responses of a stream, which generation.stream_interval_ms spaces"
    )
    p99_inter_token_ms: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of a token: its share of the gap before the response that brought it"
    )
    min_output_tokens_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="new tokens a second, of all streams together"
    )
    max_error_rate: Fraction = Field(0.0, description="share of requests that may fail")
