"""Figures of judged models as a table, as lines, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builders.judging.intervals import ConfidenceInterval
    from builders.pipeline.differences import Difference
    from builders.pipeline.judged import StepFigures
    from builders.pipeline.judged_language import LanguageFigures

_WIDTH = 160
_CONFIDENCE = "95 %"


def print_table(heading: str, rows: Sequence[tuple[str, StepFigures]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=max(console.width, _WIDTH))  # a table that is cut says nothing
    table = Table()
    headings = (heading, "M weights", "MB stored", "MB graph", "MFLOP/token", "cosine", "worst", "Spearman", "MRR",
                "recall@1", "@10", *(f"x {name}" for name in rows[0][1].speeds))  # fmt: skip
    for name in headings:
        table.add_column(name, justify="left" if name == heading else "right")
    for name, judged in rows:
        table.add_row(name, *_cells(judged))
    console.print(table)


def say(*lines: str) -> None:
    from rich.console import Console

    for line in lines:
        Console().print(line, highlight=False, soft_wrap=True, markup=False)


def print_language_table(heading: str, rows: Sequence[tuple[str, LanguageFigures]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=max(console.width, _WIDTH))
    table = Table()
    headings = (heading, "M weights", "MB stored", "MB graph", "MFLOP/token", "perplexity", "ratio", "agreement",
                "divergence", f"x {rows[0][1].executor}")  # fmt: skip
    for name in headings:
        table.add_column(name, justify="left" if name == heading else "right")
    for name, judged in rows:
        table.add_row(name, *language_cells(judged))
    console.print(table)


def language_cells(judged: LanguageFigures) -> list[str]:
    return [
        f"{judged.parameters / 1e6:.2f}",
        f"{judged.stored_bytes / 1e6:.1f}",
        f"{judged.graph_bytes / 1e6:.1f}",
        f"{judged.flops_per_token / 1e6:.2f}",
        f"{judged.perplexity:.3f}",
        f"{judged.perplexity_ratio:.4f}",
        f"{judged.mean_agreement:.1%}",
        f"{judged.mean_divergence:.4f}",
        f"{judged.speed:.2f}",
    ]


def language_heading(judged: LanguageFigures, reference: str) -> str:
    return (
        f"{judged.tokens} held-out tokens; ratio, agreement of the likeliest next token, divergence (nats) and speed "
        f"against {reference}, by CPU time"
    )


def language_json(judged: LanguageFigures) -> dict[str, Any]:
    found = judged.model_dump(
        mode="json", exclude={"files", "losses", "reference_losses", "agreement", "divergence"}
    )  # fmt: skip
    return {
        **found, "perplexity": judged.perplexity, "perplexity_ratio": judged.perplexity_ratio,
        "agreement": judged.mean_agreement, "divergence": judged.mean_divergence,
    }  # fmt: skip


def interval_line(name: str, judged: StepFigures | LanguageFigures) -> str:
    """Each figure's interval, in one line."""
    return f"{name}, {_CONFIDENCE}: " + "; ".join(f"{key} {value}" for key, value in judged.intervals.items())


def difference_lines(name: str, other: str, found: Sequence[Difference]) -> list[str]:
    """What may be said, figure by figure."""
    return [f"{name} against {other}: {each}" for each in found]


def as_json(judged: StepFigures) -> dict[str, Any]:
    found = judged.retrieval
    shown = None if found is None else {
        "pairs": found.pairs, "mrr": found.mrr, "recall_at_1": found.recall_at_1, "recall_at_10": found.recall_at_10,
    }  # fmt: skip
    return {**judged.model_dump(mode="json", exclude={"files", "cosines", "retrieval"}), "retrieval": shown}


def difference_json(found: Sequence[Difference]) -> list[dict[str, Any]]:
    return [
        {
            "figure": each.figure, "reference": each.reference, "candidate": each.candidate,
            "interval": _interval(each.interval), "verdict": each.verdict,
        }
        for each in found
    ]  # fmt: skip


def _interval(found: ConfidenceInterval | None) -> list[float] | None:
    return None if found is None else [found.low, found.high]


def _cells(judged: StepFigures) -> list[str]:
    quality, found = judged.quality, judged.retrieval
    near = (quality.mean_cosine, quality.worst_cosine) if quality else (None, None)
    figures = (*near, judged.spearman, *((found.mrr, found.recall_at_1, found.recall_at_10) if found else (None,) * 3))
    return [
        f"{judged.parameters / 1e6:.2f}",
        f"{judged.stored_bytes / 1e6:.1f}",
        f"{judged.graph_bytes / 1e6:.1f}",
        f"{judged.flops_per_token / 1e6:.2f}",
        *("" if figure is None else f"{figure:.3f}" for figure in figures),
        *(f"{speed:.2f}" for speed in judged.speeds.values()),
    ]
