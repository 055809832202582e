"""The loss curve as one HTML page: no script, nothing fetched, light or dark as the reader's system is."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from builders.training.recipe import LossPoint, TrainingReport

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 36  # margins, for the labels of the axes

_STYLE = """
:root { --page: #f6f7f9; --card: #ffffff; --ink: #14181f; --muted: #5b6574; --grid: #dfe3e9;
  --series1: #2160c4; --series2: #c2630a; }
@media (prefers-color-scheme: dark) { :root { --page: #11141a; --card: #1a1f27; --ink: #e8ebf0; --muted: #9aa5b5;
  --grid: #303845; --series1: #6ea8ff; --series2: #f5a04a; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 24px; margin: 0 0 6px; } h2 { font-size: 16px; margin: 0 0 8px; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
section { padding: 16px; margin-top: 14px; }
svg { display: block; width: 100%; height: auto; } text { font: 12px system-ui, sans-serif; fill: var(--muted); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 12px; font: 13px/1.45 ui-monospace, monospace; }
.muted { color: var(--muted); } .train { color: var(--series1); } .held { color: var(--series2); }
"""


def page(report: TrainingReport) -> str:
    """Of the small language model: figures, both losses over the tokens seen, and the sample completions."""
    judged, recipe = report.held_out, report.recipe
    samples = "".join(
        f"<pre><b>{html.escape(sample.prompt)}</b>{html.escape(sample.completion)}</pre>" for sample in report.samples
    )
    words = f"""<p class="muted">{report.parameters / 1e6:.1f} M parameters, {recipe.layers} layers of {recipe.hidden}, vocabulary
{recipe.vocabulary}; {report.train_tokens:,} tokens of {report.documents} documents, {report.epochs:.1f} times;
{report.elapsed_s:.0f} s on {report.threads} threads in {report.arithmetic}, seed {recipe.seed}.</p>
<p>On {judged.documents} documents held out ({judged.bytes:,} bytes): perplexity
<b>{judged.perplexity_per_token:.1f}</b> a token, <b>{judged.perplexity_per_byte:.2f}</b> a byte.</p>"""  # noqa: E501
    more = f"<section>\n<h2>What it writes</h2>\n{samples}</section>"
    return _document("Small language model", words, report.curve, "Loss, nats a token", more)


def training_page(title: str, words: Sequence[str], points: Sequence[LossPoint]) -> str:
    """Of any training: what was trained, in `words`, and its losses over the tokens seen."""
    said = "".join(f'<p class="muted">{html.escape(word)}</p>\n' for word in words)
    return _document(html.escape(title), said, points, "Loss", "")


def _document(title: str, words: str, points: Sequence[LossPoint], loss: str, more: str) -> str:
    held_out = ', <span class="held">held out</span>' if points[-1].held_out is not None else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{words}
<section>
<h2>{loss}: <span class="train">training</span>{held_out}</h2>
{curve(points)}
</section>
{more}
</main>
</body>
</html>
"""


def curve(points: Sequence[LossPoint]) -> str:
    """The `<svg>` element. Loss over tokens, both axes linear."""
    every = [loss for point in points for loss in (point.train, point.held_out) if loss is not None]
    ticks = _ticks(min(every), max(every))
    lowest, highest = ticks[0], ticks[-1]
    most = points[-1].tokens

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * tokens / most

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (highest - loss) / (highest - lowest)

    judged = [(point.tokens, point.held_out) for point in points if point.held_out is not None]
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over tokens">',
            *_grid(x, y, ticks, [most * part // 4 for part in range(5)]),
            _line(x, y, [(point.tokens, point.train) for point in points], "var(--series1)"),
            _line(x, y, judged, "var(--series2)"),
            "</svg>",
        ]
    )


def _ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers, about five, from at most `lowest` to at least `highest`."""
    rough = max(highest - lowest, abs(highest) * 1e-3, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def _line(
    x: Callable[[float], float], y: Callable[[float], float], losses: Sequence[tuple[int, float]], colour: str
) -> str:
    if not losses:
        return ""
    path = " ".join(f"{x(at):.1f},{y(loss):.1f}" for at, loss in losses)
    dots = "".join(
        f'<circle cx="{x(at):.1f}" cy="{y(loss):.1f}" r="2.5" style="fill: {colour}"/>' for at, loss in losses
    )
    return f'<polyline points="{path}" style="fill: none; stroke: {colour}; stroke-width: 1.8"/>{dots}'


def _grid(
    x: Callable[[float], float], y: Callable[[float], float], losses: Sequence[float], tokens: Sequence[int]
) -> list[str]:
    parts = []
    for loss in losses:
        at = f'y1="{y(loss):.1f}" y2="{y(loss):.1f}"'
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" {at} style="stroke: var(--grid)"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.4g}</text>')
    for count in tokens:
        anchor = "end" if count == tokens[-1] else "middle"
        label = f"{count / 1e3:,.0f} k"
        parts.append(f'<text x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{label}</text>')
    middle = (WIDTH + LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">tokens seen</text>')
    return parts
