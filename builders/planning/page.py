"""Plans and partitions as maps, and as one HTML page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html import escape

from builders.artifacts import Partition, PipelineStage
from builders.planning.picture import STYLE, DrawnStage, Map, Rank, amount, draw, milliseconds
from builders.planning.plan import CONTEXT_BYTES, Candidate, StagePlan

_FIGURE = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( ?[^\s\d]{1,9})?")  # and its unit

_PAGE_STYLE = """
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.figure { text-align: right; font-variant-numeric: tabular-nums; }
"""


def map_of_plan(title: str, chosen: Candidate) -> Map:
    """One replica: all are alike."""
    copies = f"{chosen.replicas} replicas like this one" if chosen.replicas > 1 else "one replica"
    times = f"answers after {milliseconds(chosen.first_token_ms)}"
    if chosen.between_tokens_ms:
        times = f"first token after {milliseconds(chosen.first_token_ms)}, "
        times += f"{milliseconds(chosen.between_tokens_ms)} between tokens"
    notes = (
        f"{chosen.gpus} GPU{'s' * (chosen.gpus > 1)}: {chosen.tensor} tensor x {chosen.pipeline} pipeline, {copies}; "
        f"{amount(CONTEXT_BYTES)} of each GPU for the runtime",
        f"{times}, {chosen.tokens_per_s:.0f} tokens/s, bound by {chosen.bound_by}",
    )
    return Map(title, notes, tuple(_planned(chosen, index) for index in range(chosen.pipeline)))


def _planned(chosen: Candidate, index: int) -> DrawnStage:
    stage = chosen.stages[index]
    fullest = max(each.cache_bytes_per_token for each in chosen.stages)
    cached = chosen.cache_bytes * stage.cache_bytes_per_token // fullest if fullest else 0
    rank = Rank(
        "",
        (
            ("split", stage.weight_bytes - stage.whole_bytes),
            ("whole", stage.whole_bytes),
            ("cache", cached),
            ("activations", chosen.activation_bytes),
            ("runtime", CONTEXT_BYTES),
        ),
        chosen.room_bytes,
    )
    ranks = tuple(Rank(f"rank {number}", rank.parts, rank.capacity) for number in range(chosen.tensor))
    held = ["embeddings"] * (index == 0) + [f"{stage.layers} layers"] + ["head"] * stage.head
    last = index == chosen.pipeline - 1
    return DrawnStage(
        f"stage {index}", ", ".join(held), ranks, _said(chosen, stage, last), None if last else "hidden\nstates"
    )


def _said(chosen: Candidate, stage: StagePlan, last: bool) -> tuple[str, ...]:
    gathers = int(stage.head)
    reduces = stage.collectives - gathers - (not last)
    counts = {"all-reduce": reduces, "all-gather": gathers} if chosen.tensor > 1 else {}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    told = ", ".join(filter(None, [told, "" if last else "1 hand-over"]))
    return (f"{told}; {amount(stage.collective_bytes_per_token)} a token" if told else "no collectives",)


def map_of_partition(partition: Partition) -> Map:
    """What `trireme shard` wrote: weights only, for no GPU in particular."""
    notes = (
        f"{partition.tensor} tensor x {partition.pipeline} pipeline; {amount(partition.source_bytes)} of weights",
        f"{amount(partition.rank_bytes)} on the fullest rank, ideal {amount(partition.ideal_bytes)}",
    )
    return Map(
        f"partition of {partition.source_file}",
        notes,
        tuple(_written(partition, index, stage) for index, stage in enumerate(partition.stages)),
    )


def _written(partition: Partition, index: int, stage: PipelineStage) -> DrawnStage:
    whole = sum(weight.bytes for weight in stage.weights if weight.cut is None) if partition.tensor > 1 else 0
    parts = (("split", stage.rank_bytes - whole), ("whole", whole))
    ranks = tuple(Rank(f"rank {rank}", parts) for rank in range(partition.tensor))  # type: ignore[arg-type]  # literals
    counts = Counter(each.operation.replace("_", "-") for each in stage.collectives)
    moved = sum(each.bytes_per_token for each in stage.collectives)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    said = f"{told}; {amount(moved)} a token" if told else "no collectives"
    sent = [port for later in partition.stages for port in later.inputs if port.from_stage == index]
    names = "\n".join(dict.fromkeys(port.name[:16] for port in sent[:2]))
    return DrawnStage(f"stage {index}", f"{len(stage.weights)} weights", ranks, (said,), names or None)


def page(title: str, notes: Sequence[str], maps: Sequence[Map], tables: Sequence[str] = ()) -> str:
    """A whole HTML document, which is XML too: nothing in it is fetched from elsewhere."""
    pictures = "".join(f'<div class="scroll">{draw(each)}</div>' for each in maps)
    told = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    return (
        f'<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/><title>{escape(title)}</title>'
        f"<style>{STYLE}{_PAGE_STYLE}</style></head><body><h1>{escape(title)}</h1>{told}{pictures}"
        f"{''.join(tables)}</body></html>\n"
    )


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Figures stand at the right; the first column names the row."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(f"<tr><td>{escape(row[0])}</td>" + "".join(map(_cell, row[1:])) + "</tr>" for row in rows)
    return f'<div class="scroll"><h2>{escape(caption)}</h2><table><tr>{top}</tr>{body}</table></div>'


def _cell(told: str) -> str:
    """A text that begins with a number, such as a date, is no figure."""
    return f'<td class="figure">{escape(told)}</td>' if _FIGURE.fullmatch(told) else f"<td>{escape(told)}</td>"
