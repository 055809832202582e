"""The loop as one HTML page without a script: versions, data, losses and decisions, update by update."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from builders.planning.page import page, table
from online.gate.forgetting import Change
from online.loop.gathered import unread_text
from online.loop.records import LoopState, UpdateRecord, UpdateStage
from online.loop.steps import decision_text, said_of, shares_text
from online.tasks.reading import WORDS

_COLUMN, _LEFT, _RIGHT = 188, 104, 16
_TOP, _LOSS, _NEW, _OLD, _FOOT = 64, 70, 110, 90, 40  # heights of the panels, from above
_GAP = 30
_SHOWN = 24  # updates in the picture: the newest
_COLOURS = {
    UpdateStage.PROMOTED: "var(--activations)", UpdateStage.REFUSED: "#c8372d", UpdateStage.ROLLED_BACK: "var(--cache)"
}  # fmt: skip


def timeline_page(name: str, state: LoopState, ended: Sequence[UpdateRecord]) -> str:
    """`ended`: oldest first."""
    updates = [*ended, *([state.update] if state.update is not None else [])]
    learnt = updates[-1].task if updates else "generation"
    notes = [
        f"champion: version {state.champion.version}, since {state.champion.since}; "
        + (f"challenger: version {state.challenger}" if state.challenger else "no challenger"),
        f"updates that ended: {len(ended)}; promoted: {sum(one.stage is UpdateStage.PROMOTED for one in ended)}; "
        f"feedback is read to number {state.fed_to}",
        f"Perplexity is of {WORDS[learnt].loss}: of what is new on its hold-out, of earlier domains on halves that the "
        "update was not chosen by; bounds are one-sided at 95 %.",
    ]
    parts = [_picture(updates[-_SHOWN:]) if updates else "", table("Updates", HEADS, list(map(row_of, updates)))]
    parts += [_decisions(one) for one in updates if one.decisions]
    return page(f"Online learning of {name}", notes, (), parts)


HEADS = ("update", "began", "data", "new domain", "earlier domains", "taken", "speed", "outcome", "why")


def row_of(update: UpdateRecord) -> tuple[str, ...]:
    """Cells of a table, for a page and for a terminal."""
    verdict, report = update.verdict, update.report
    new = "" if verdict is None or verdict.new is None else _change(verdict.new)
    old = (
        "" if verdict is None else ", ".join(f"{one.domain} {one.change:+.1%}{shares_text(one)}" for one in verdict.old)
    )
    unread = f"; not read: {unread_text(update.unread_why)}" if update.unread_why else ""
    return (
        str(update.number), update.began.replace("T", " ").removesuffix("+00:00"),
        f"{update.samples} samples, {update.rows} + {update.held_out_rows} rows ({update.trigger}){unread}", new, old,
        "" if report is None else f"{report.step.share:.0%}",
        "" if update.speed is None else f"{update.speed.ratio:.2f}",
        said_of(update) if update.ended else f"{update.stage}", update.reason,
    )  # fmt: skip


def _change(new: Change) -> str:
    return f"{new.before:.4g} -> {new.after:.4g} ({new.change:+.1%}){shares_text(new)}"


def _decisions(update: UpdateRecord) -> str:
    heads = ("decision", "share", *update.decisions[-1].figures)
    rows = [
        (decision_text(one), f"{one.share:.0%}", *(f"{one.figures.get(head, 0):.4g}" for head in heads[2:]))
        for one in update.decisions
    ]
    return table(f"Rollout of version {update.version} (update {update.number}); e-values", heads, rows)


def _picture(updates: Sequence[UpdateRecord]) -> str:
    """A column for each update: outcome, loss while it learnt, and what became of old and new text."""
    wide = _LEFT + _COLUMN * len(updates) + _RIGHT
    high = _TOP + _LOSS + _NEW + _OLD + 3 * _GAP + _FOOT
    worst = [one.high for update in updates if update.verdict for one in update.verdict.old]
    allowed = max(update.budget.max_forgetting for update in updates)
    most = max(0.04, 1.3 * allowed, *(min(value, 0.5) for value in worst))
    loss, new = _TOP, _TOP + _LOSS + _GAP
    old = new + _NEW + _GAP
    parts = [
        *_panel(loss, _LOSS, ("loss while", "it learnt"), wide),
        *_panel(new, _NEW, ("new domain,", "perplexity", "0 to -100 %"), wide),
        *_panel(old, _OLD, ("earlier ones,", f"0 to +{most:.0%},", f"{allowed:.1%} allowed"), wide),
        _rule(old + _OLD * (1 - allowed / most), wide),
    ]
    for place, update in enumerate(updates):
        left = _LEFT + place * _COLUMN
        parts += [*_head(left, update), *_losses(left, loss, update)]
        parts += [*_new_bar(left, new, update), *_old_bars(left, old, update, most)]
    return (
        f'<div class="scroll"><svg class="map" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img" '
        f'aria-label="updates by outcome, loss and perplexity">{"".join(parts)}</svg></div>'
    )


def _head(left: int, update: UpdateRecord) -> list[str]:
    colour = _COLOURS.get(update.stage, "var(--runtime)")
    version = "no version" if update.version is None else f"version {update.version}"
    return [
        f'<rect x="{left + 8}" y="8" width="{_COLUMN - 16}" height="44" rx="6" style="fill: {colour}"/>',
        _text(left + _COLUMN / 2, 27, f"update {update.number}: {version}", "middle", "fill: #fff; font-weight: 600"),
        _text(left + _COLUMN / 2, 44, str(update.stage).replace("_", " "), "middle", "fill: #fff"),
    ]


def _losses(left: int, top: int, update: UpdateRecord) -> list[str]:
    if update.report is None or not update.report.curve:
        return []
    points = update.report.curve
    losses = [point.train for point in points]
    low, high = min(losses), max(losses)
    path = " ".join(
        f"{left + 14 + (_COLUMN - 28) * number / max(len(losses) - 1, 1):.1f},"
        f"{top + 16 + (_LOSS - 24) * (high - loss) / max(high - low, 1e-9):.1f}"
        for number, loss in enumerate(losses)
    )
    return [
        f'<polyline points="{path}" style="fill: none; stroke: var(--split); stroke-width: 1.8"/>',
        _text(left + 14, top + 11, f"{losses[0]:.2f}", "start"),
        _text(left + _COLUMN - 14, top + _LOSS - 14, f"{losses[-1]:.2f}", "end"),
    ]


def _new_bar(left: int, top: int, update: UpdateRecord) -> list[str]:
    if update.verdict is None or update.verdict.new is None:
        return []
    found = update.verdict.new
    high = _NEW * min(max(-found.change, 0.0), 1.0)
    told = f"{found.change:+.1%}"
    return [
        f'<rect x="{left + 50}" y="{top}" width="{_COLUMN - 100}" height="{high:.1f}" style="fill: var(--split)"/>',
        _text(left + _COLUMN / 2, min(top + high + 14, top + _NEW - 4), told, "middle", _WEIGHT),
    ]


_WEIGHT = "font-weight: 600"


def _old_bars(left: int, top: int, update: UpdateRecord, most: float) -> list[str]:
    """The newest three of the domains; the line goes up to the bound."""
    if update.verdict is None:
        return []
    shown = update.verdict.old[-3:]
    wide = (_COLUMN - 40) / max(len(shown), 1)
    parts = []
    for place, one in enumerate(shown):
        x = left + 20 + place * wide
        high = _OLD * min(max(one.change / most, 0.0), 1.0)
        bound = _OLD * min(max(one.high / most, 0.0), 1.0)
        centre, foot = x + wide / 2, top + _OLD
        parts += [
            f'<rect x="{x + wide * 0.25:.1f}" y="{foot - high:.1f}" width="{wide * 0.5:.1f}" height="{high:.1f}" '
            f'style="fill: var(--whole)"/>',
            f'<line x1="{centre:.1f}" x2="{centre:.1f}" y1="{foot - high:.1f}" y2="{foot - bound:.1f}" '
            f'style="stroke: var(--ink); stroke-width: 1.5"/>',
            _text(centre, foot + 15, f"{one.change:+.1%}", "middle", _WEIGHT),
            _text(centre, foot + 29, one.domain, "middle", "fill: var(--soft)"),
        ]
    return parts


def _panel(top: float, high: float, names: Sequence[str], wide: float) -> list[str]:
    told = [_text(8, top + 14 + 15 * place, name, "start", "fill: var(--soft)") for place, name in enumerate(names)]
    return [
        f'<rect class="panel" x="{_LEFT}" y="{top}" width="{wide - _LEFT - _RIGHT}" height="{high}"/>',
        *told,
    ]


def _rule(y: float, wide: float) -> str:
    line = f'x1="{_LEFT}" x2="{wide - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line {line} style="stroke: #c8372d; stroke-dasharray: 5 4"/>'


def _text(x: float, y: float, told: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(told)}</text>'
