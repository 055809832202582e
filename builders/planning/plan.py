"""How many GPUs, and how they share the model: arithmetic only, before anything is exported or rented.

A roofline: a step takes as long as its bytes from memory or its operations, whichever is longer, plus what the
collectives move. Peaks are never reached, so all are taken at a fraction. Narrow weights are computed at the rate of
FP16, so INT8 may be faster than said; launching kernels is not counted, so a small model is slower. The point is to
compare layouts and to see what cannot fit; a load test has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from builders.planning.gpus import GIGA, Gpu
from builders.planning.transformer import Model
from runtime.record import Record

MEMORY_SHARE = 0.9  # the rest: fragmentation, and what the driver keeps
CONTEXT_BYTES = 1 << 30  # CUDA context, TensorRT runtime, NCCL buffers; an assumption, as are the next lines
FLOPS_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.6, 0.8, 0.7  # of the peaks, the same for every GPU
TABLE_SHARE = 0.1  # of all weights: what a table of words must be over for its split to be worth an all-reduce
COLLECTIVE_SECONDS = {"nvlink": 8e-6, "pcie": 25e-6}  # latency of one collective of a small message


class ExpectedLoad(Record):
    """One moment of traffic on all replicas, and the limits that it must meet; None asks for nothing."""

    sequences: int
    prompt_tokens: int
    output_tokens: int = 0
    max_first_token_ms: float | None = None
    max_between_tokens_ms: float | None = None
    min_tokens_per_s: float | None = None


class StagePlan(Record):
    """One pipeline stage, as one of its ranks sees it. `whole_bytes` are the weights that every rank holds."""

    layers: int
    head: bool
    weight_bytes: int
    whole_bytes: int
    cache_bytes_per_token: int
    collectives: int
    collective_bytes_per_token: int


class Candidate(Record):
    """One layout. Bytes are those of the fullest GPU. `reasons` say why it is not used; empty: it fits and is fast.

    `first_token_ms` of an encoder is the time for all its sequences. `tokens_per_s` counts tokens that a decoder makes,
    and those that an encoder reads.
    """

    gpu: str
    tensor: int
    pipeline: int
    replicas: int
    gpus: int
    stages: tuple[StagePlan, ...]
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    total_bytes: int
    room_bytes: int
    first_token_ms: float
    between_tokens_ms: float
    tokens_per_s: float
    bound_by: str
    reasons: tuple[str, ...]

    @property
    def collective_bytes_per_token(self) -> int:
        return sum(stage.collective_bytes_per_token for stage in self.stages)


def plan(model: Model, gpu: Gpu, load: ExpectedLoad, *, max_gpus: int = 8) -> tuple[Candidate, ...]:
    """Every tensor x pipeline x replicas of up to `max_gpus` GPUs, fewest GPUs first, then the fastest.

    Tensor ranks that do not divide the heads are left out, and stages beyond the layers.
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


def shortlist(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """For each tensor x pipeline the fewest replicas that do, or the replicas that come nearest."""
    groups: dict[tuple[int, int], list[Candidate]] = {}
    for each in candidates:
        groups.setdefault((each.tensor, each.pipeline), []).append(each)
    return tuple(best(group) or nearest(group) for _, group in sorted(groups.items()))


def nearest(candidates: Sequence[Candidate]) -> Candidate:
    """Of layouts that do not do, the one that misses least: first by limits, then by memory, then by speed."""
    return min(candidates, key=lambda each: (len(each.reasons), each.total_bytes, -each.tokens_per_s))


def divides(model: Model, tensor: int) -> bool:
    """As the partitioner sees it: heads and widths divide; key and value heads divide, or repeat evenly."""
    kv = model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
    return model.heads % tensor == 0 and model.ffn % tensor == 0 and kv


def splits_table(model: Model) -> bool:
    """Whether ranks share the rows of the table of words out, at one all-reduce more."""
    table = model.embedding_parameters * model.value_bytes
    tables = 1 if model.tied or not model.generates else 2
    return table > TABLE_SHARE * (tables * table + model.layers * model.block_parameters * model.weight_bits / 8)


def plan_stages(model: Model, tensor: int, pipeline: int) -> tuple[StagePlan, ...]:
    """Layers dealt out as the partitioner cuts: what is multiplied counts twice, as bytes to hold and to compute.

    The table of words lies in the first stage, split where it is a large share; the head is cut by vocabulary in the
    last one. Where both are cut alike in one stage, or one rank is alone, a tied table is held once.
    """
    kv = 2 * model.hidden * model.head_dim * model.kv_heads
    repeats = max(1, tensor // model.kv_heads)  # ranks that share a head hold its projections again
    block = (model.block_parameters - kv + kv * repeats) / tensor * model.weight_bits / 8
    table = model.embedding_parameters * model.value_bytes
    split = tensor > 1 and splits_table(model)
    held = table / tensor if split else table
    head = table / tensor if model.generates else 0.0
    costs = [0.0] * pipeline
    costs[0] += held
    costs[-1] += 2 * head
    layers = [0] * pipeline
    for _ in range(model.layers):
        least = min(range(pipeline), key=lambda stage: (costs[stage] + 2 * block * layers[stage], stage))
        layers[least] += 1
    shared = model.tied and pipeline == 1 and held == head
    return tuple(
        _stage(
            model,
            tensor,
            layers=count,
            whole=table if index == 0 and tensor > 1 and not split else 0,
            lookup=index == 0 and split,
            last=index == pipeline - 1,
            weights=count * block + (held if index == 0 else 0) + (head if index == pipeline - 1 and not shared else 0),
        )
        for index, count in enumerate(layers)
    )


def _stage(
    model: Model, tensor: int, *, layers: int, whole: int, lookup: bool, last: bool, weights: float
) -> StagePlan:
    """Bytes are sent by one rank in rings: two all-reduces a layer, one for a split table of words, one all-gather of
    the logits, one hand-over.
    """
    heads = max(1, model.kv_heads // tensor)
    gathers = last and model.generates
    reduced = (2 * layers + lookup) * 2 * (tensor - 1) * model.hidden * model.value_bytes / tensor
    gathered = (tensor - 1) * model.vocabulary * model.value_bytes / tensor if gathers else 0
    handed_over = 0 if last else model.hidden * model.value_bytes
    return StagePlan(
        layers=layers,
        head=gathers,
        weight_bytes=math.ceil(weights),
        whole_bytes=whole,
        cache_bytes_per_token=2 * layers * heads * model.head_dim * model.value_bytes if model.generates else 0,
        collectives=(2 * layers + lookup + gathers) * (tensor > 1) + (not last),
        collective_bytes_per_token=math.ceil(reduced + gathered + handed_over),
    )


def step_seconds(
    model: Model, gpu: Gpu, tensor: int, stage: StagePlan, sequences: int, tokens: int, context: int
) -> tuple[float, str]:
    """One stage for `sequences`, each with `tokens` new ones and `context` in its cache; and what bounds it."""
    new = sequences * tokens
    block = model.block_parameters / tensor
    head = model.embedding_parameters / tensor if stage.head else 0.0  # logits of the last token of each sequence only
    attention = 4 * new * (context + tokens) * model.heads * model.head_dim * stage.layers / tensor
    operations = 2 * new * stage.layers * block + 2 * sequences * head + attention
    compute = operations / (gpu.flops * FLOPS_SHARE)
    read = stage.layers * block * model.weight_bits / 8 + head * model.value_bytes
    memory = (read + stage.cache_bytes_per_token * sequences * context) / (gpu.bandwidth * BANDWIDTH_SHARE)
    moved = stage.collective_bytes_per_token * new
    links = moved / (gpu.link_bandwidth * LINK_SHARE) + stage.collectives * COLLECTIVE_SECONDS[gpu.link]
    bound = max((compute, "compute"), (memory, "memory"), (links, "links"))[1]
    return max(compute, memory) + links, bound


def _candidate(model: Model, gpu: Gpu, load: ExpectedLoad, tensor: int, pipeline: int, replicas: int) -> Candidate:
    sequences = math.ceil(load.sequences / replicas)
    context = load.prompt_tokens + load.output_tokens
    stages = plan_stages(model, tensor, pipeline)
    first, between, rate, bound = _times(model, gpu, load, tensor, stages, sequences)
    caches = [stage.cache_bytes_per_token * sequences * context for stage in stages]
    fullest = max(range(pipeline), key=lambda index: stages[index].weight_bytes + caches[index])
    activations = _activation_bytes(model, tensor, sequences, load)
    total = stages[fullest].weight_bytes + caches[fullest] + activations + CONTEXT_BYTES
    room = int(gpu.memory_bytes * MEMORY_SHARE)
    return Candidate(
        gpu=gpu.name,
        tensor=tensor,
        pipeline=pipeline,
        replicas=replicas,
        gpus=tensor * pipeline * replicas,
        stages=stages,
        weight_bytes=stages[fullest].weight_bytes,
        cache_bytes=caches[fullest],
        activation_bytes=activations,
        total_bytes=total,
        room_bytes=room,
        first_token_ms=first * 1e3,
        between_tokens_ms=between * 1e3,
        tokens_per_s=replicas * rate,
        bound_by=bound,
        reasons=_reasons(gpu, load, total - room, total, first * 1e3, between * 1e3, replicas * rate),
    )


def _times(
    model: Model, gpu: Gpu, load: ExpectedLoad, tensor: int, stages: Sequence[StagePlan], sequences: int
) -> tuple[float, float, float, str]:
    """Seconds to the first token and between tokens, tokens per second of a replica, and what bounds the slowest stage.

    The sequences go through the stages in as many parts as there are stages, so that none is idle.
    """
    waves = min(len(stages), sequences)
    part, context = math.ceil(sequences / waves), load.prompt_tokens + load.output_tokens
    new, held = (1, context) if model.generates else (load.prompt_tokens, 0)
    steps = [step_seconds(model, gpu, tensor, stage, part, new, held) for stage in stages]
    slowest, bound = max(steps)
    cycle = max(sum(seconds for seconds, _ in steps), waves * slowest)
    if not model.generates:
        return cycle, 0.0, sequences * new / cycle, bound
    prefill = sum(step_seconds(model, gpu, tensor, stage, 1, load.prompt_tokens, 0)[0] for stage in stages)
    return prefill, cycle, sequences / cycle, bound


def _activation_bytes(model: Model, tensor: int, sequences: int, load: ExpectedLoad) -> int:
    """The widest moment: residual, normed input and both feed-forward halves of a prefill, or logits of a step."""
    tokens = load.prompt_tokens if model.generates else sequences * load.prompt_tokens
    wide = (3 * model.hidden + 2 * model.ffn // tensor) * model.value_bytes * tokens
    logits = sequences * model.vocabulary * 4 if model.generates else 0
    return max(wide, logits)


def _reasons(
    gpu: Gpu, load: ExpectedLoad, over: int, total: int, first_ms: float, between_ms: float, rate: float
) -> tuple[str, ...]:
    found = []
    if over > 0:
        found.append(f"needs {total / GIGA:.1f} GB on a GPU, {gpu.name} has room for {(total - over) / GIGA:.1f}")
    if load.max_first_token_ms is not None and first_ms > load.max_first_token_ms:
        awaited = "first token" if between_ms else "answers"
        found.append(f"{awaited} after {first_ms:.3g} ms, limit {load.max_first_token_ms:.3g}")
    if load.max_between_tokens_ms is not None and between_ms > load.max_between_tokens_ms:
        found.append(f"{between_ms:.3g} ms between tokens, limit {load.max_between_tokens_ms:.3g}")
    if load.min_tokens_per_s is not None and rate < load.min_tokens_per_s:
        found.append(f"{rate:.0f} tokens/s, wanted {load.min_tokens_per_s:.0f}")
    return tuple(found)


def _powers(limit: int) -> list[int]:
    """Ranks that collectives and heads like: 1, 2, 4, 8, …"""
    return [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]
