"""One step of the spec, carried out on a model in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from builders.artifacts import Checkpoint
from builders.checkpoint.widths import layers_of, widths_of_model
from builders.compress import importance, kept, plan, prune
from builders.compress.cluster import cluster
from builders.compress.importance import Forward, Worth
from builders.compress.judged import by_text, outputs
from builders.compress.low_rank import low_rank, rank_multiple
from builders.compress.refit import least_squares
from builders.compress.sparsify import sparsify
from builders.compress.texts import CalibrationText, labelled
from builders.spec import PruneSlice, StepSlice

_PARTS_OF_THE_WAY = (1.0, 0.5, 0.25)

AsForward = Callable[[Any], Forward]  # the whole way from a model's inputs to its vectors or logits


def carry_out(
    step: StepSlice, model: Any, as_forward: AsForward, checkpoint: Checkpoint, texts: CalibrationText, tensor: int
) -> list[str]:
    """Changes `model`, and says what a reader should know of how. Raises InputError for texts that do not suffice."""
    before = widths_of_model(model)
    if step.low_rank is not None:
        asked = step.low_rank
        batches = texts.batches(asked.tokens, "low_rank.tokens") if asked.method == "whitened" else []
        low_rank(model, as_forward(model), batches, asked, rank_multiple(tensor))
        notes = []
    elif step.sparsify is not None:
        sparse = step.sparsify
        batches = [] if sparse.method == "magnitude" else texts.batches(sparse.tokens, "sparsify.tokens")
        share = sparsify(model, as_forward(model), batches, sparse)
        return [f"{share:.1%} of the layers' weights are 0, which makes no file smaller and no answer faster here"]
    elif step.cluster is not None:
        coded = step.cluster
        batches = texts.batches(coded.tokens, "cluster.tokens") if coded.weighted == "hessian" else []
        cluster(model, as_forward(model), batches, coded)
        return [f"codebooks of {2**coded.bits} values, expanded at load: served as large and as fast as before"]
    else:
        assert step.prune is not None
        notes = _prune(step.prune, model, as_forward, checkpoint, texts, tensor)
    return [described(before, widths_of_model(model)), *notes]


def _prune(
    asked: PruneSlice, model: Any, as_forward: AsForward, checkpoint: Checkpoint, texts: CalibrationText, tensor: int
) -> list[str]:
    whole = copy.deepcopy(model) if asked.refit is not None else None
    matched: Sequence[int] = range(len(layers_of(model)))

    def worth() -> Worth:
        return _worth(asked, model, as_forward(model), checkpoint, texts)

    if "layers" in asked.what:
        matched = asked.keep_layers or kept.best(worth().layers, plan.layers_that_stay(asked, len(matched))).tolist()
        prune.keep_layers(model, matched)
    if {"heads", "ffn"} & set(asked.what):
        scores, multiples, group = worth(), plan.multiples(tensor), widths_of_model(model).group
        heads = [layer.reshape(-1, group).sum(1) for layer in scores.heads]  # those that share keys and values as one
        chosen = {
            what: kept.kept(found, asked.ranking, asked.amount if exact is None else None, exact, multiples[what])
            if what in asked.what
            else [np.arange(len(layer)) for layer in found]
            for what, found, exact in (
                ("heads", heads, None if asked.heads is None else asked.heads // group),
                ("ffn", scores.ffn, asked.ffn),
            )
        }
        prune.keep(model, chosen["heads"], chosen["ffn"])
    if whole is None:
        return []
    return [_refitted(asked, model, whole, as_forward, matched, texts)]


def _worth(asked: PruneSlice, model: Any, forward: Forward, checkpoint: Checkpoint, texts: CalibrationText) -> Worth:
    if asked.importance == "magnitude":
        return importance.magnitude(model)
    if asked.importance == "gauss_newton":
        measured = importance.gauss_newton if checkpoint.generation is None else importance.fisher
        return measured(model, forward, texts.batches(asked.tokens, "prune.tokens"), asked.seed)
    assert asked.labels is not None
    return importance.taylor(model, forward, *labelled(checkpoint, asked.labels))


def _refitted(
    asked: PruneSlice, model: Any, whole: Any, as_forward: AsForward, matched: Sequence[int], texts: CalibrationText
) -> str:
    """The whole way to the fitted weights, or a part of it: the best on average of those whose worst text is no worse
    than without, of texts that the fit did not see. None of the way where there is no such part."""
    watched = texts.watched()
    wanted = outputs(as_forward(whole), watched)

    def judged() -> Any:
        return by_text(wanted, outputs(as_forward(model), watched))

    before, start = judged(), copy.deepcopy(model.state_dict())
    batches = texts.batches(asked.refit_tokens, "prune.refit_tokens")
    least_squares(model, as_forward(model), whole, as_forward(whole), matched, batches)
    end, tried = copy.deepcopy(model.state_dict()), {0.0: before}
    for part in _PARTS_OF_THE_WAY:
        model.load_state_dict(_between(start, end, part))
        tried[part] = judged()
    sound = [part for part, found in tried.items() if found.min() >= before.min()]
    taken = max(sound, key=lambda part: float(tried[part].mean()))
    model.load_state_dict(_between(start, end, taken))
    after = tried[taken] if taken else tried[_PARTS_OF_THE_WAY[-1]]
    return (
        f"refit {f'kept, {taken:g} of the way' if taken else 'undone: the worst text got worse'}; {len(wanted)} texts "
        f"that it did not see, cosine mean {before.mean():.4f} -> {after.mean():.4f}, worst {before.min():.4f} -> "
        f"{after.min():.4f}"
    )


def _between(start: dict[str, Any], end: dict[str, Any], part: float) -> dict[str, Any]:
    return {name: value + part * (end[name] - value) for name, value in start.items()}


def described(before: Any, after: Any) -> str:
    """Each layer's widths, where they changed."""
    parts = []
    if len(before.layers) != len(after.layers):
        parts.append(f"layers {len(before.layers)} -> {len(after.layers)}")
    if before.hidden != after.hidden:
        parts.append(f"width {before.hidden} -> {after.hidden}")
    for what in ("heads", "ffn"):
        old, new = plan.counts(before, what), plan.counts(after, what)
        if old[: len(new)] != new:
            parts.append(f"{what} {_numbers(old)} -> {_numbers(new)}")
    ranks = sorted({(part, rank) for layer in after.layers for part, rank in layer.ranks.items()})
    for part in dict.fromkeys(part for part, _ in ranks):
        found = [layer.ranks.get(part) for layer in after.layers]
        if found != [layer.ranks.get(part) for layer in before.layers]:
            parts.append(f"ranks of {part} {_numbers(found)}")
    return "; ".join(parts) or "nothing changed"


def _numbers(found: Sequence[int | None]) -> str:
    same = len(set(found)) == 1
    return str(found[0]) if same else "/".join("whole" if each is None else str(each) for each in found)
