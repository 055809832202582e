"""What a search found, as one HTML page without a script, and the chosen recipe as a spec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from builders.pipeline.search import Finalist, Found
from builders.pipeline.space import Tried
from builders.planning.page import page, table
from builders.spec import DeploymentSpec

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 30, 44  # margins, for the labels of the axes
_LARGEST, _SMALLEST = 13, 4  # radii
_TICKS = 5

Scale = Callable[[float], float]


def search_page(spec: DeploymentSpec, found: Found) -> str:
    """Speed across, cosine upwards, size as the dots' area; then the front, and the finalists on held-out texts."""
    best = found.front
    notes = [
        f"{len(found.trials)} trials, {len(found.trials) - found.resumed} of them in this run; speed is the original's "
        f"time over the candidate's on {spec.cpu_executor}, by CPU time in the same run.",
        "Cosines of trials are untrained, on texts that neither calibrate nor judge; the finalists' are "
        + ("after a short training, " if found.trained else "")
        + "on held-out texts, with 95 % intervals.",
        "Chosen: " + (found.chosen.trial.told if found.chosen else "none is within the budget"),
    ]
    rows = [_trial_row(each) for each in best]
    parts = [
        picture(found, best),
        table("The front: within the budget, and beaten in both by none", _HEADS, rows),
        table("Finalists, on held-out texts", _FINAL_HEADS, [_final_row(each, found) for each in found.finalists]),
    ]
    if found.own is not None:
        parts.insert(2, table("The spec's own steps, measured like a trial", _HEADS, [_trial_row(found.own)]))
    return page(f"Search for a smaller {spec.name}", notes, (), parts)


_HEADS = ("recipe", "cosine", "worst", "x as fast", "M weights")
_FINAL_HEADS = ("recipe", "cosine", "MRR", "x as fast", "MB of the graph", "verdict")


def _trial_row(each: Tried) -> tuple[str, ...]:
    return (each.told, f"{each.cosine:.3f}", f"{each.worst:.3f}", f"{each.speed:.2f}", f"{each.parameters / 1e6:.2f}")


def _final_row(each: Finalist, found: Found) -> tuple[str, ...]:
    judged = each.judged
    speeds = ", ".join(f"{speed:.2f} {name}" for name, speed in judged.speeds.items())
    missed = ", ".join(f"misses {key} with {value:.3f}" for key, value in each.missed.items())
    mrr = "" if judged.retrieval is None else f"{judged.retrieval.mrr:.3f} ({judged.intervals['mrr']})"
    return (
        each.trial.told,
        f"{judged.quality.mean_cosine:.3f} ({judged.intervals['mean_cosine']})" if judged.quality else "",
        mrr,
        speeds,
        f"{judged.graph_bytes / 1e6:.1f}",
        missed or ("chosen" if each is found.chosen else "within the budget"),
    )


def picture(found: Found, best: Sequence[Tried]) -> str:
    """The `<svg>` element, in a box that scrolls."""
    shown = [*found.trials, *([found.own] if found.own else [])]
    if not shown:
        return ""
    x, x_ticks = _axis([each.speed for each in shown], LEFT, WIDTH - RIGHT)
    y, y_ticks = _axis([each.cosine for each in shown], HEIGHT - BOTTOM, TOP)
    chosen = None if found.chosen is None else found.chosen.trial.number
    largest = max(each.parameters for each in shown)
    path = " ".join(f"{x(each.speed):.1f},{y(each.cosine):.1f}" for each in best)
    dots = [
        _dot(each, x, y, largest, _kind(each, best, chosen)) for each in sorted(shown, key=lambda one: -one.parameters)
    ]
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="cosine over speed">{"".join(_grid(x, y, x_ticks, y_ticks))}'
        f'<polyline points="{path}" style="fill: none; stroke: var(--split); stroke-width: 1.5"/>{"".join(dots)}'
        f"</svg>{_LEGEND}</div>"
    )


_COLOURS = {
    "chosen": ("var(--activations)", "chosen"),
    "own": ("var(--whole)", "the spec's own steps"),
    "front": ("var(--split)", "the front"),
    "within": ("var(--runtime)", "within the budget"),
    "over": ("none", "over the budget"),
}
_LEGEND = (
    '<p class="soft">'
    + " · ".join(
        '<svg width="14" height="12"><circle cx="7" cy="6" r="5" '
        f'style="fill: {colour}; stroke: var(--runtime)"/></svg> {escape(told)}'
        for colour, told in _COLOURS.values()
    )
    + " · the larger the dot, the more weights</p>"
)


def _kind(each: Tried, best: Sequence[Tried], chosen: int | None) -> str:
    if each.number < 0:
        return "own"
    if each.number == chosen:
        return "chosen"
    return "front" if each in best else "over" if each.missed else "within"


def _dot(each: Tried, x: Scale, y: Scale, largest: int, kind: str) -> str:
    radius = max(_SMALLEST, _LARGEST * (each.parameters / largest) ** 0.5)
    told = f"{each.told}: cosine {each.cosine:.3f}, {each.speed:.2f} x, {each.parameters / 1e6:.2f} M weights"
    style = f"fill: {_COLOURS[kind][0]}; fill-opacity: 0.75; stroke: var(--runtime)"
    return (
        f'<circle cx="{x(each.speed):.1f}" cy="{y(each.cosine):.1f}" r="{radius:.1f}" style="{style}">'
        f"<title>{escape(told)}</title></circle>"
    )


def _axis(values: Sequence[float], start: float, end: float) -> tuple[Scale, list[float]]:
    """A linear scale with room at both ends, and where its lines stand."""
    low, high = min(values), max(values)
    room = max(high - low, 1e-3) * 0.08
    low, high = low - room, high + room

    def scale(value: float) -> float:
        return start + (end - start) * (value - low) / (high - low)

    return scale, [low + (high - low) * part / _TICKS for part in range(_TICKS + 1)]


def _grid(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    text = 'style="fill: var(--soft); font: 12px system-ui, sans-serif"'
    line = 'style="stroke: var(--line)"'
    parts = []
    for tick in y_ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" {line}/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" {text}>{tick:.3f}</text>')
    for tick in x_ticks:
        at = f'x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text {at} text-anchor="middle" {text}>{tick:.2f}</text>')
    middle = (WIDTH + LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle" {text}>times as fast</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 16}" text-anchor="end" {text}>cosine</text>')
    return parts


def recipe_text(spec: DeploymentSpec, chosen: Finalist) -> str:
    """A spec file with the chosen steps."""
    import yaml

    steps = [step.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for step in chosen.trial.steps]
    data = spec.model_dump(mode="json", exclude_defaults=True, exclude={"compress", "budget"})
    if steps:
        data["compress"] = steps
        if spec.budget is not None:
            data["budget"] = spec.budget.model_dump(mode="json", exclude_defaults=True)
    head = f"# Chosen by `trireme search`: {chosen.trial.told}\n"
    return head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
