"""How many GPUs, and how they share the model: arithmetic only, before anything is exported or rented.

A roofline: a step takes as long as its bytes from memory or its operations, whichever is longer, plus what the
collectives move. Peaks are never reached, so both are taken at a fraction. The point is to compare layouts and to see
what cannot fit; a load test has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from builders.artifacts import Record
from builders.errors import InputError

GIGA, TERA, GIB = 10**9, 10**12, 1 << 30
_MEMORY_SHARE = 0.9  # the rest: fragmentation, and what the driver keeps
_CONTEXT_BYTES = 1 * GIB  # CUDA context, TensorRT runtime, NCCL buffers
_FLOPS_SHARE, _BANDWIDTH_SHARE, _LINK_SHARE = 0.6, 0.8, 0.7  # of the peaks; assumptions, the same for every GPU
_COLLECTIVE_SECONDS = {"nvlink": 8e-6, "pcie": 25e-6}  # latency of one collective of a small message; assumptions


class Gpu(Record):
    """Peaks from the maker: dense FP16 operations, and link bytes per second in one direction."""

    name: str
    memory_bytes: int
    bandwidth: int
    flops: int
    link_bandwidth: int
    link: str
    source: str


_SITE = "https://www.nvidia.com/en-us/data-center"


def _gpu(name: str, gigabytes: int, bandwidth_gb: int, tflops: float, link_gb: int, link: str, source: str) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=gigabytes * GIGA,
        bandwidth=bandwidth_gb * GIGA,
        flops=int(tflops * TERA),
        link_bandwidth=link_gb * GIGA,
        link=link,
        source=source,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("L4", 24, 300, 121, 32, "pcie", f"{_SITE}/l4/"),
        _gpu("A10G", 24, 600, 70, 32, "pcie", "https://aws.amazon.com/ec2/instance-types/g5/"),
        _gpu("A100-40", 40, 1555, 312, 300, "nvlink", f"{_SITE}/a100/"),
        _gpu("A100-80", 80, 2039, 312, 300, "nvlink", f"{_SITE}/a100/"),
        _gpu("H100", 80, 3350, 989, 450, "nvlink", f"{_SITE}/h100/"),
        _gpu("H200", 141, 4800, 989, 450, "nvlink", f"{_SITE}/h200/"),
        _gpu("B200", 180, 8000, 2250, 900, "nvlink", f"{_SITE}/hgx/"),
    )
}


class Model(Record):
    """A transformer by its sizes. `weight_bits` are those of the matrices; activations and caches are `value_bytes`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    generates: bool = True
    weight_bits: float = 16
    value_bytes: int = 2

    @property
    def block_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        heads = 1 if self.tied or not self.generates else 2
        return self.layers * self.block_parameters + heads * self.embedding_parameters


class Load(Record):
    """One moment of traffic on all replicas, and the limits that it must meet; None asks for nothing."""

    sequences: int
    prompt_tokens: int
    output_tokens: int = 0
    max_first_token_ms: float | None = None
    max_between_tokens_ms: float | None = None
    min_tokens_per_s: float | None = None


class Candidate(Record):
    """One layout. Bytes are those of the fullest GPU. `reasons` say why it is not used; empty: it fits and is fast."""

    gpu: str
    tensor: int
    pipeline: int
    replicas: int
    gpus: int
    weight_bytes: int
    cache_bytes_per_token: int
    cache_bytes: int
    activation_bytes: int
    total_bytes: int
    collective_bytes_per_token: int
    first_token_ms: float
    between_tokens_ms: float
    tokens_per_s: float
    bound_by: str
    reasons: tuple[str, ...]


def model_from_config(config: Mapping[str, Any], *, weight_bits: float = 16) -> Model:
    """Sizes from a Hugging Face `config.json`. Raises InputError for a key that is missing."""

    def size(*names: str, default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if found is None:
            raise InputError(
                "config.json", got=f"no {names[0]}", expected="the sizes of a transformer", fix="add the key"
            )
        return int(found)

    hidden = size("hidden_size", "n_embd", "dim", "d_model")
    heads = size("num_attention_heads", "n_head", "n_heads", "num_heads")
    architectures = " ".join(config.get("architectures") or [])
    return Model(
        layers=size("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config.get("d_kv") or hidden // heads),
        ffn=size("intermediate_size", "hidden_dim", "d_ff", "n_inner", default=4 * hidden),
        vocabulary=size("vocab_size"),
        gated=_gated(config),
        tied=bool(config.get("tie_word_embeddings", config.get("model_type") in ("gpt2", "t5", "gemma"))),
        generates=any(word in architectures for word in ("CausalLM", "LMHead", "ConditionalGeneration")),
        weight_bits=weight_bits,
    )


def _gated(config: Mapping[str, Any]) -> bool:
    """Whether the feed-forward part multiplies two projections (SwiGLU and its kin)."""
    named = "gated" in str(config.get("feed_forward_proj", "")) or str(config.get("model_type")).startswith("gemma")
    return named or str(config.get("hidden_act")) in ("silu", "swish")


def plan(model: Model, gpu: Gpu, load: Load, *, max_gpus: int = 8) -> tuple[Candidate, ...]:
    """Every tensor x pipeline x replicas of up to `max_gpus` GPUs, fewest GPUs first, then the fastest.

    Tensor ranks beyond the heads are left out, and stages beyond the layers.
    """
    layouts = [
        (tensor, pipeline, replicas)
        for tensor in _powers(max_gpus)
        for pipeline in range(1, max_gpus // tensor + 1)
        for replicas in range(1, max_gpus // (tensor * pipeline) + 1)
        if divides(model, tensor) and pipeline <= model.layers and replicas <= load.sequences
    ]
    found = [_candidate(model, gpu, load, *layout) for layout in layouts]
    return tuple(sorted(found, key=lambda each: (each.gpus, bool(each.reasons), -each.tokens_per_s, each.pipeline)))


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The fewest GPUs that fit and meet every limit; of those, the most tokens per second. None: nothing does."""
    fit = [each for each in candidates if not each.reasons]
    return min(fit, key=lambda each: (each.gpus, -each.tokens_per_s), default=None)


def divides(model: Model, tensor: int) -> bool:
    """As the partitioner sees it: heads and widths divide; key and value heads divide, or repeat evenly."""
    kv = model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
    return model.heads % tensor == 0 and model.ffn % tensor == 0 and kv


def weight_bytes(model: Model, tensor: int, pipeline: int) -> int:
    """Weights of the fullest GPU. Embeddings are whole in the first stage; the head is cut by vocabulary in the last.

    Key and value projections are held again by ranks that share a head.
    """
    repeats = max(1, tensor // model.kv_heads)
    kv = 2 * model.hidden * model.head_dim * model.kv_heads
    block = (model.block_parameters - kv + kv * repeats) / tensor
    layers = math.ceil(model.layers / pipeline)
    head = model.embedding_parameters / tensor if model.generates else 0
    values = model.embedding_parameters * model.value_bytes
    body = layers * block * model.weight_bits / 8
    return math.ceil(
        max(body + values + (head * model.value_bytes if pipeline == 1 else 0), body + head * model.value_bytes)
    )


def cache_bytes_per_token(model: Model, tensor: int, pipeline: int) -> int:
    """Keys and values that one GPU keeps for one token."""
    heads = max(1, model.kv_heads // tensor)
    return 2 * math.ceil(model.layers / pipeline) * heads * model.head_dim * model.value_bytes if model.generates else 0


def collective_bytes_per_token(model: Model, tensor: int, pipeline: int) -> int:
    """Sent by one rank in rings: two all-reduces a layer of the stage, one all-gather of the logits, one hand-over."""
    layers = math.ceil(model.layers / pipeline)
    reduces = 2 * layers * 2 * (tensor - 1) * model.hidden * model.value_bytes / tensor
    gather = (tensor - 1) * model.vocabulary * model.value_bytes / tensor if model.generates else 0
    handover = model.hidden * model.value_bytes if pipeline > 1 else 0
    return math.ceil(reduces + gather + handover)


def step_seconds(
    model: Model, gpu: Gpu, tensor: int, pipeline: int, sequences: int, tokens: int, context: int
) -> tuple[float, str]:
    """One stage for `sequences`, each with `tokens` new ones and `context` in its cache; and what bounds it."""
    new = sequences * tokens
    parameters = math.ceil(model.layers / pipeline) * model.block_parameters / tensor
    if model.generates:
        parameters += sequences / new * model.embedding_parameters / tensor / pipeline  # logits of the last token only
    attention = (
        4 * new * (context + tokens) * model.heads * model.head_dim * math.ceil(model.layers / pipeline) / tensor
    )
    compute = (2 * new * parameters + attention) / (gpu.flops * _FLOPS_SHARE)
    read = parameters * model.weight_bits / 8 + cache_bytes_per_token(model, tensor, pipeline) * sequences * context
    memory = read / (gpu.bandwidth * _BANDWIDTH_SHARE)
    collectives = 2 * math.ceil(model.layers / pipeline) if tensor > 1 else 0
    moved = collective_bytes_per_token(model, tensor, pipeline) * new
    links = moved / (gpu.link_bandwidth * _LINK_SHARE) + (collectives + (pipeline > 1)) * _COLLECTIVE_SECONDS[gpu.link]
    bound = max((compute, "compute"), (memory, "memory"), (links, "links"))[1]
    return max(compute, memory) + links, bound


def _candidate(model: Model, gpu: Gpu, load: Load, tensor: int, pipeline: int, replicas: int) -> Candidate:
    sequences = math.ceil(load.sequences / replicas)
    waves = min(pipeline, sequences)  # parts of the batch that fill the stages
    part = math.ceil(sequences / waves)
    context = load.prompt_tokens + load.output_tokens
    prefill, bound = step_seconds(model, gpu, tensor, pipeline, 1, load.prompt_tokens, 0)
    first, between, rate = prefill * pipeline, 0.0, 0.0
    if model.generates:
        step, bound = step_seconds(model, gpu, tensor, pipeline, part, 1, context)
        between = step * pipeline
        rate = replicas * sequences / between
    else:
        step, bound = step_seconds(model, gpu, tensor, pipeline, part, load.prompt_tokens, 0)
        first, rate = step * pipeline, replicas * part * load.prompt_tokens / step
    per_token = cache_bytes_per_token(model, tensor, pipeline)
    weights, cache = weight_bytes(model, tensor, pipeline), per_token * sequences * context
    activations = _activation_bytes(model, tensor, sequences, load)
    total = weights + cache + activations + _CONTEXT_BYTES
    return Candidate(
        gpu=gpu.name,
        tensor=tensor,
        pipeline=pipeline,
        replicas=replicas,
        gpus=tensor * pipeline * replicas,
        weight_bytes=weights,
        cache_bytes_per_token=per_token,
        cache_bytes=cache,
        activation_bytes=activations,
        total_bytes=total,
        collective_bytes_per_token=collective_bytes_per_token(model, tensor, pipeline),
        first_token_ms=first * 1e3,
        between_tokens_ms=between * 1e3,
        tokens_per_s=rate,
        bound_by=bound,
        reasons=_reasons(gpu, load, total, first * 1e3, between * 1e3, rate),
    )


def _activation_bytes(model: Model, tensor: int, sequences: int, load: Load) -> int:
    """The widest moment: residual, normed input and both feed-forward halves of a prefill, or logits of a step."""
    tokens = load.prompt_tokens if model.generates else sequences * load.prompt_tokens
    wide = (3 * model.hidden + 2 * model.ffn // tensor) * model.value_bytes * tokens
    logits = sequences * model.vocabulary * 4 if model.generates else 0
    return max(wide, logits)


def _reasons(gpu: Gpu, load: Load, total: int, first_ms: float, between_ms: float, rate: float) -> tuple[str, ...]:
    room = gpu.memory_bytes * _MEMORY_SHARE
    found = []
    if total > room:
        found.append(f"needs {total / GIGA:.1f} GB on a GPU, {gpu.name} has room for {room / GIGA:.1f}")
    if load.max_first_token_ms is not None and first_ms > load.max_first_token_ms:
        found.append(f"first token after {first_ms:.0f} ms, limit {load.max_first_token_ms:.0f}")
    if load.max_between_tokens_ms is not None and between_ms > load.max_between_tokens_ms:
        found.append(f"{between_ms:.1f} ms between tokens, limit {load.max_between_tokens_ms:.1f}")
    if load.min_tokens_per_s is not None and rate < load.min_tokens_per_s:
        found.append(f"{rate:.0f} tokens/s, wanted {load.min_tokens_per_s:.0f}")
    return tuple(found)


def _powers(limit: int) -> list[int]:
    """Ranks that collectives and heads like: 1, 2, 4, 8, …"""
    return [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]
