"""What the server under test has proven of itself: the figures of its version's proof, from its metrics page."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.prometheus import metric_lines
from runtime.record import Record


class ProofFigure(Record):
    """`name` is a mean cosine, a worst cosine, a perplexity ratio …; `limit` is what the spec's budget allows of it."""

    name: str
    value: float
    limit: float


def proof_from_metrics(page: str, model: str, version: str) -> tuple[ProofFigure, ...]:
    """Of the version that is served. Empty where the service shows none."""
    found: dict[str, dict[str, float]] = {"value": {}, "limit": {}}
    for kind, labels, value in metric_lines(page, "trireme_proof_"):
        if kind in found and (labels.get("model"), labels.get("version")) == (model, version) and "figure" in labels:
            found[kind][labels["figure"]] = value
    limits = found["limit"]
    values = sorted(found["value"].items())
    return tuple(ProofFigure(name=name, value=value, limit=limits[name]) for name, value in values if name in limits)


def proof_text(figures: Sequence[ProofFigure]) -> str:
    """`mean cosine 0.99872 (budget 0.998), worst cosine 0.99598 (budget 0.995)`."""
    if not figures:
        return "no figures: the service shows none"
    return ", ".join(f"{figure.name} {figure.value:.5f} (budget {figure.limit:.6g})" for figure in figures)
