"""A plan for several GPU types, in records, rows and a page."""

from __future__ import annotations

from collections.abc import Sequence

from builders.planning.gpus import Gpu
from builders.planning.page import map_of_plan, page, table
from builders.planning.picture import amount, milliseconds
from builders.planning.plan import Candidate, ExpectedLoad, best, nearest, plan, shortlist
from builders.planning.transformer import Model
from runtime.record import Record

_DECODER = ("GPU", "layout", "weights", "cache", "free", "first token", "between", "tokens/s", "bound by", "verdict")
_ENCODER = ("GPU", "layout", "weights", "free", "answers", "tokens/s", "bound by", "verdict")


class Choice(Record):
    """One GPU type. `layouts` holds one line for each tensor x pipeline; `best` is None where nothing does."""

    gpu: Gpu
    best: Candidate | None
    nearest: Candidate
    layouts: tuple[Candidate, ...]


class PlanReport(Record):
    """What `trireme plan` finds: everything that it was told, and a choice for each GPU type. `not_counted`: steps of
    the spec's compress whose savings the figures leave out."""

    name: str
    model: Model
    load: ExpectedLoad
    max_gpus: int
    not_counted: tuple[str, ...] = ()
    choices: tuple[Choice, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """Of the rows of `layout_rows`."""
        return _DECODER if self.model.generates else _ENCODER

    @property
    def summary(self) -> str:
        load, model = self.load, self.model
        left_out = f"; without what {', '.join(self.not_counted)} of compress saves" if self.not_counted else ""
        made = f" and {load.output_tokens} made" if model.generates else ""
        return (
            f"{model.parameters / 1e6:.0f} M parameters at {model.weight_bits:g} bits, {load.sequences} sequences of "
            f"{load.prompt_tokens} tokens read{made}; up to {self.max_gpus} GPUs{left_out}"
        )


def report_plan(
    name: str, model: Model, gpus: Sequence[Gpu], load: ExpectedLoad, max_gpus: int, not_counted: Sequence[str] = ()
) -> PlanReport:
    choices = []
    for gpu in gpus:
        found = plan(model, gpu, load, max_gpus=max_gpus)
        chosen = best(found)
        choices.append(Choice(gpu=gpu, best=chosen, nearest=chosen or nearest(found), layouts=shortlist(found)))
    return PlanReport(
        name=name, model=model, load=load, max_gpus=max_gpus, not_counted=tuple(not_counted), choices=tuple(choices)
    )


def layout_rows(result: PlanReport) -> list[tuple[str, ...]]:
    """Every layout of one GPU type; of several types, the best or nearest one of each."""
    if len(result.choices) == 1:
        choice = result.choices[0]
        return [_row(each, verdict(each, choice.best)) for each in choice.layouts]
    return [_row(choice.nearest, verdict(choice.nearest, choice.best)) for choice in result.choices]


def verdict(found: Candidate, chosen: Candidate | None) -> str:
    """One reason, or what speaks for it."""
    if found.reasons:
        return found.reasons[0]
    if chosen is None or found == chosen:
        return f"best: {found.gpus} GPU{'s' * (found.gpus > 1)}"
    if found.gpus > chosen.gpus:
        return f"does, but {chosen.gpus} GPU{'s' * (chosen.gpus > 1)} would do"
    return f"does, at {found.tokens_per_s / chosen.tokens_per_s:.0%} of the best one's tokens/s"


def _row(found: Candidate, told: str) -> tuple[str, ...]:
    """Cells of a decoder, or of an encoder, which has neither a cache nor a time between tokens."""
    free = found.room_bytes - found.total_bytes
    cache = [amount(found.cache_bytes)] if found.between_tokens_ms else []
    between = [milliseconds(found.between_tokens_ms)] if found.between_tokens_ms else []
    return (
        found.gpu,
        f"{found.tensor} x {found.pipeline}" + (f", {found.replicas} replicas" if found.replicas > 1 else ""),
        amount(found.weight_bytes),
        *cache,
        amount(free) if free >= 0 else "none",
        milliseconds(found.first_token_ms),
        *between,
        f"{found.tokens_per_s:.0f}",
        found.bound_by,
        told,
    )


def report_page(result: PlanReport) -> str:
    """One map for each GPU type that does, and every layout of every type in tables."""
    maps = [map_of_plan(choice.gpu.name, choice.best) for choice in result.choices if choice.best is not None]
    tables = [
        table(
            f"{choice.gpu.name}: layouts, tensor x pipeline",
            result.heads[1:],
            [_row(each, verdict(each, choice.best))[1:] for each in choice.layouts],
        )
        for choice in result.choices
    ]
    sources = table(
        "GPU figures",
        ("GPU", "memory", "bandwidth/s", "dense FP16 TFLOP/s", "link/s, one way", "from"),
        [
            (
                gpu.name,
                amount(gpu.memory_bytes),
                amount(gpu.bandwidth),
                f"{gpu.flops / 1e12:.0f}",
                f"{amount(gpu.link_bandwidth)} {gpu.link}",
                f"{gpu.document}, {gpu.source}",
            )
            for gpu in (choice.gpu for choice in result.choices)
        ],
    )
    notes = (result.summary, "A roofline at fractions of the peaks: compare layouts with it, then measure.")
    return page(f"Plan for {result.name}", notes, maps, [*tables, sources])
