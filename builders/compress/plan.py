"""What a step may ask of a model, known from widths alone: before a weight is read, for all steps of a spec."""

from __future__ import annotations

from collections.abc import Sequence

from builders.checkpoint.widths import DECODERS, LayerWidths, Widths, parts_of
from builders.compress.distil_plan import Teacher, distilled
from builders.errors import SpecError
from builders.spec import ClusterSlice, LowRankSlice, PruneSlice, SparsifySlice, StepSlice

FFN_MULTIPLE = 8  # neurons of a rank come in eights, the lanes of a vector of fp32
_ATTENTION, _FFN = ("query", "key", "value", "attention_output"), ("gate", "ffn_in", "ffn_out")
_ASKED = {"ffn": _FFN, "attention": _ATTENTION, "all": (*_ATTENTION, *_FFN)}


def check(
    steps: Sequence[StepSlice], widths: Widths, tensor: int, first: int = 0, teacher: Teacher | None = None
) -> Widths:
    """The widths that are left. Raises SpecError for the first step that this model cannot take; `first` is the number
    of `steps[0]`. Without a teacher, the model itself is that of an embedding.

    With global ranking, what a layer keeps is known only when it is measured; for the steps behind, it counts here as
    the average, and each step is checked again on what the one before left.
    """
    teacher = teacher or Teacher(widths, "embedding")
    for number, step in enumerate(steps, first):
        key = f"compress.{number}.{step.name}"
        if step.cluster is not None:
            _cluster(step.cluster, widths, key, last=step is steps[-1])
        if step.sparsify is not None:
            _sparsify(step.sparsify, widths, key)
        if step.prune is not None:
            widths = _pruned(step.prune, widths, tensor, key)
        if step.distil is not None:
            _no_zeros_yet(steps[: number - first], key)
            widths = distilled(step.distil, widths, teacher, key)
        if step.low_rank is not None:
            widths = _low_rank(step.low_rank, widths, key)
    return widths


def asked_parts(low_rank: LowRankSlice, model_type: str) -> list[str]:
    """The matrices of a layer that `parts` means."""
    return [part for part in parts_of(model_type) if part in _ASKED[low_rank.parts]]


def multiples(tensor: int, group: int = 1) -> dict[str, int]:
    """What heads and neurons of a layer come in, so that `parallel.tensor` ranks share them out evenly. `group` heads
    share keys and values, and go together."""
    return {"heads": tensor * group, "ffn": FFN_MULTIPLE * tensor}


def counts(widths: Widths, what: str) -> list[int]:
    """Heads, or neurons, of each layer."""
    return [layer.heads if what == "heads" else layer.ffn for layer in widths.layers]


def stay(there: Sequence[int], amount: float | None, exact: int | None, multiple: int) -> int:
    """How many of all layers' heads or neurons remain, in multiples, and at least one multiple a layer."""
    wanted = (1 - (amount or 0)) * sum(there) if exact is None else exact * len(there)
    most = sum(count // multiple for count in there)
    return multiple * min(most, max(len(there), round(wanted / multiple)))


def layers_that_stay(prune: PruneSlice, layers: int) -> int:
    if prune.keep_layers is not None:
        return len(prune.keep_layers)
    return max(1, round((1 - (prune.amount or 0)) * layers))


def _pruned(prune: PruneSlice, widths: Widths, tensor: int, key: str) -> Widths:
    layers = widths.layers
    if widths.model_type in DECODERS:
        _decoder(prune, key)
    if "layers" in prune.what:
        layers = _fewer_layers(prune, layers, key)
    for what, exact in (("heads", prune.heads), ("ffn", prune.ffn)):
        if what not in prune.what:
            continue
        there, multiple = (
            counts(widths.model_copy(update={"layers": layers}), what),
            multiples(tensor, widths.group)[what],
        )
        heads = (
            "parallel.tensor" if widths.group == 1 else f"parallel.tensor x {widths.group} that share keys and values"
        )
        reason = heads if what == "heads" else f"{FFN_MULTIPLE} x parallel.tensor"
        odd = next((count for count in there if count % multiple), None)
        if odd is not None:
            raise SpecError(
                key, got=f"{odd} {what} in a layer", expected=f"a multiple of {multiple} ({reason})",
                fix="change parallel.tensor",
            )  # fmt: skip
        if exact is not None and (exact % multiple or exact > min(there)):
            raise SpecError(
                f"{key}.{what}", got=exact, expected=f"a multiple of {multiple} ({reason}), under {min(there)}",
                fix=f"use {max(multiple, min(exact, min(there)) // multiple * multiple)}",
            )  # fmt: skip
        total = stay(there, prune.amount, exact, multiple)
        if total >= sum(there):
            raise SpecError(
                f"{key}.{what if exact is not None else 'amount'}", got=exact if exact is not None else prune.amount,
                expected=f"enough to take out some of the {sum(there)} {what}, in multiples of {multiple}",
                fix=f"take out more, or leave {what} out of `what`",
            )  # fmt: skip
        left = max(multiple, total // len(layers) // multiple * multiple)
        layers = tuple(layer.model_copy(update={what: left}) for layer in layers)
    return widths.model_copy(update={"layers": layers})


def _decoder(prune: PruneSlice, key: str) -> None:
    """What is not built for language models."""
    if prune.refit is not None:
        raise SpecError(
            f"{key}.refit", got=prune.refit, expected="nothing: it is built for encoders, whose sums go into a norm",
            fix="remove it, and put a distil step behind",
        )  # fmt: skip
    if "heads" in prune.what and prune.ranking == "global":
        raise SpecError(
            f"{key}.ranking", got="global with heads", expected="uniform: all layers of a cache have as many heads",
            fix="use ranking: uniform; neurons may be ranked by a step of their own",
        )  # fmt: skip


def _fewer_layers(prune: PruneSlice, layers: tuple[LayerWidths, ...], key: str) -> tuple[LayerWidths, ...]:
    if prune.keep_layers is not None and prune.keep_layers[-1] >= len(layers):
        raise SpecError(
            f"{key}.keep_layers", got=prune.keep_layers[-1], expected=f"numbers of the {len(layers)} layers, from 0",
            fix=f"name layers up to {len(layers) - 1}",
        )  # fmt: skip
    left = layers_that_stay(prune, len(layers))
    if left >= len(layers):
        raise SpecError(
            key, got=f"{left} of {len(layers)} layers that stay", expected="fewer",
            fix="take out more, or leave layers out of `what`",
        )  # fmt: skip
    return layers[:left]


def _low_rank(low_rank: LowRankSlice, widths: Widths, key: str) -> Widths:
    parts = asked_parts(low_rank, widths.model_type)
    for number, part, (inputs, outputs) in widths.matrices():
        if part not in parts:
            continue
        if part in widths.layers[number].ranks:
            raise SpecError(
                f"{key}.parts", got=f"{part} of layer {number}, which is a product already", expected="whole matrices",
                fix="give one low_rank step for each part, with the rank that is to remain",
            )  # fmt: skip
        even = break_even(inputs, outputs)
        if low_rank.rank != "auto" and low_rank.rank > even:
            raise SpecError(
                f"{key}.rank", got=low_rank.rank,
                expected=f"at most {even}: above it, two factors of {part} of layer {number} ({inputs} x {outputs}) "
                "hold more weights than the matrix",
                fix=f"use less than {even}, or leave these parts out",
            )  # fmt: skip
    ranks = dict.fromkeys(parts, 0 if low_rank.rank == "auto" else low_rank.rank)  # auto: known when it is measured
    layers = tuple(layer.model_copy(update={"ranks": {**layer.ranks, **ranks}}) for layer in widths.layers)
    return widths.model_copy(update={"layers": layers})


def _cluster(cluster: ClusterSlice, widths: Widths, key: str, last: bool) -> None:
    if not last:
        raise SpecError(
            key, got="a step behind it", expected="the last step: whatever changes weights makes other values of them "
            "than the codebooks hold",
            fix="move cluster to the end",
        )  # fmt: skip
    codes = 2 * 2**cluster.bits  # bytes
    wasted = next((size for size in _groups(cluster, widths) if codes + size * cluster.bits / 8 >= size * 4), None)
    if wasted:
        raise SpecError(
            f"{key}.bits", got=f"{cluster.bits} bits for {wasted} weights that share a codebook",
            expected="fewer bytes than the weights themselves take",
            fix="use fewer bits, or let more weights share a codebook",
        )  # fmt: skip
    odd = cluster.block and next((count for count in _inputs(widths) if count % cluster.block), None)
    if odd:
        raise SpecError(
            f"{key}.block", got=cluster.block, expected=f"what divides the rows of all matrices, such as {odd}",
            fix="use 8, or per: row",
        )  # fmt: skip


def _sparsify(sparsify: SparsifySlice, widths: Widths, key: str) -> None:
    odd = next((count for count in _inputs(widths) if count % 4), None)
    if sparsify.pattern == "2:4" and odd:
        raise SpecError(
            f"{key}.pattern", got=f"2:4 with {odd} inputs of a matrix", expected="a multiple of 4",
            fix="use pattern: unstructured",
        )  # fmt: skip


def _no_zeros_yet(steps: Sequence[StepSlice], key: str) -> None:
    """Training moves every weight, also one that is zero."""
    if any(step.sparsify is not None or (step.distil is not None and step.distil.sparsity) for step in steps):
        raise SpecError(
            key, got="a step before it that makes zeros", expected="none: training would fill them again",
            fix="remove that step, and give distil.sparsity to this one (amount of each row, by magnitude)",
        )  # fmt: skip


def _groups(cluster: ClusterSlice, widths: Widths) -> list[int]:
    if cluster.block is not None:
        return [cluster.block]
    per_row = cluster.per == "row"
    return [inputs if per_row else inputs * outputs for _, _, (inputs, outputs) in widths.matrices()]


def _inputs(widths: Widths) -> list[int]:
    """Of every matrix, and of the second factors of thin ones."""
    found = [inputs for _, _, (inputs, _) in widths.matrices()]
    return found + [rank for layer in widths.layers for rank in layer.ranks.values()]


def break_even(inputs: int, outputs: int) -> int:
    """The largest rank whose two factors hold no more weights than the matrix: KN / (K + N)."""
    return inputs * outputs // (inputs + outputs)
