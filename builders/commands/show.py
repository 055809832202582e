"""What a person sees of a build: progress bars and tables. Nothing here decides anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from builders.artifacts import Partition
from builders.pipeline import Build, Report
from loadtest.plan import RunProgress

if TYPE_CHECKING:
    from builders.partition.prove.verify import VerifyReport


@contextmanager
def build_progress(quiet: bool) -> Iterator[Report]:
    """A bar over the stages with the step under way; plain lines where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda stage, message: console.print(f"{stage:<11} {message}", highlight=False)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<11}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, message: str) -> None:
            for other in [name for name in tasks if name != stage]:
                progress.update(tasks.pop(other), total=1, completed=1)
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=None, detail="")
            progress.update(tasks[stage], detail=message)

        yield report
        for task in tasks.values():
            progress.update(task, total=1, completed=1)


@contextmanager
def load_progress(quiet: bool) -> Iterator[Callable[[RunProgress], None]]:
    """A bar over the seconds of a load test; nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda progress: None
        return
    with Progress(TextColumn("load test"), BarColumn(24), TextColumn("{task.fields[detail]}"), console=console) as bars:
        task = bars.add_task("load", total=None, detail="starting Locust")

        def show(progress: RunProgress) -> None:
            detail = f"{progress.users} users, {progress.answered} answered, {progress.errors} errors"
            bars.update(task, total=progress.end_s, completed=progress.elapsed_s, detail=detail)

        yield show


def print_build(built: Build) -> None:
    """One table of the artifacts, and where they are served from."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{built.spec.name} on {built.platform}", title_justify="left")
    for heading in ("artifact", "figures"):
        table.add_column(heading)
    for name, value in build_rows(built):
        table.add_row(name, value)
    console = Console()
    print_choice(built)
    console.print(table)
    if built.entry is not None:
        where = f"model repository: {built.entry.repository} (version {built.entry.version})"
        console.print(where, highlight=False, soft_wrap=True)


def print_choice(built: Build) -> None:
    """All candidates with their figures, and why each is served or not; nothing where none were weighed."""
    from rich.console import Console
    from rich.table import Table

    choice, console = built.choice, Console()
    if choice is None:
        return
    where = f"{choice.executor} on {choice.processor.name}, {choice.processor.cores} cores"
    table = Table(title=f"precision.cpu: {choice.asked} -> {choice.chosen} ({where})", title_justify="left")
    for heading in ("candidate", "speed of fp32", "quality", "verdict"):
        table.add_column(heading)
    for item in choice.candidates:
        speed = "" if item.speed is None else f"{item.speed:.2f}"
        table.add_row(item.precision, speed, item.quality.summary if item.quality else "", item.reason)
    console.print(table)
    if choice.warning:
        console.print(f"warning: {choice.warning}", style="yellow", highlight=False, soft_wrap=True)


def build_rows(*builds: Build) -> Iterator[tuple[str, str]]:
    """Name and figures of every artifact; one that two builds share comes once."""
    seen = set()
    for built in builds:
        for row in _rows(built):
            if row[0] not in seen:
                seen.add(row[0])
                yield row


def _rows(built: Build) -> Iterator[tuple[str, str]]:
    for item in built.graphs:
        yield f"graph {item.precision}", f"{item.bytes / 1e6:.1f} MB, {item.quality.summary}"
    if built.served is not None:
        yield f"service {built.spec.precision.cpu}", built.served.summary
    if built.partition is not None:
        shared = built.partition
        yield (
            f"partition {shared.tensor} x {shared.pipeline}",
            f"{shared.rank_bytes / 1e6:.1f} MB a rank at most (ideal {shared.ideal_bytes / 1e6:.1f}), proven equal",
        )
    for engine in built.engines:
        rank = f" stage {engine.stage} rank {engine.rank}" if built.partition is not None else ""
        rank += f", cache of {engine.capacity}" if engine.capacity else ""
        yield (
            f"engine {engine.target} {engine.precision}{rank}",
            f"{engine.bytes / 1e6:.1f} MB, {engine.flavour} {engine.version}, built in {engine.build_seconds} s",
        )


def build_json(built: Build) -> dict[str, Any]:
    """The same for programs; digests included."""
    return {
        "spec": {"name": built.spec.name, "digest": built.spec.digest},
        "platform": built.platform,
        "precision": built.choice.model_dump(mode="json") if built.choice else None,
        "checkpoint": {**built.checkpoint.model_dump(mode="json"), "digest": built.checkpoint.digest},
        "graphs": [{**item.model_dump(mode="json"), "digest": item.digest} for item in built.graphs],
        "served_quality": built.served.model_dump(mode="json") if built.served else None,
        "partition": built.partition.model_dump(mode="json") if built.partition else None,
        "engines": [{**item.model_dump(mode="json"), "digest": item.digest} for item in built.engines],
        "repository": built.entry.model_dump(mode="json") if built.entry else None,
    }


def partition_text(partition: Partition) -> str:
    """What each rank holds, what the ranks say to each other, and what could not be split."""
    megabytes, ideal = partition.rank_bytes / 1e6, partition.ideal_bytes / 1e6
    lines = [f"{partition.directory}: {partition.tensor} x {partition.pipeline} ranks, {megabytes:.1f} MB at most each"]
    lines.append(f"  ideal {ideal:.1f} MB (1/{partition.tensor * partition.pipeline} of the weights)")
    for number, stage in enumerate(partition.stages):
        kinds = Counter(item.operation for item in stage.collectives)
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no collectives"
        moved = sum(item.bytes_per_token for item in stage.collectives)
        lines.append(f"  stage {number}: {stage.rank_bytes / 1e6:.1f} MB a rank, {said}, {moved} bytes a token")
    lines += [f"  kept whole: {name}: {reason}" for name, reason in partition.kept_whole.items()]
    return "\n".join([*lines, "not proven yet: run `trireme verify`"])


def verify_text(found: VerifyReport) -> str:
    return (
        f"equal: {found.processes} rank processes, {len(found.checks)} comparisons, largest relative difference "
        f"{found.max_relative:.1e}, cosine at least {found.min_cosine:.6f}, {found.seconds:.1f} s"
    )
