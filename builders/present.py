"""What a person sees of a build: progress bars and tables. Nothing here decides anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from builders.pipeline import Build, Report


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


def print_build(built: Build) -> None:
    """One table of the artifacts, and what to type next."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{built.spec.name} on {built.platform}", title_justify="left")
    for heading in ("artifact", "size", "mean cosine", "worst cosine", "checked with"):
        table.add_column(heading, justify="right" if heading not in ("artifact", "checked with") else "left")
    for row in _rows(built):
        table.add_row(*row)
    console = Console()
    console.print(table)
    if built.entry is not None:
        console.print(
            f"model repository: {built.entry.repository} (version {built.entry.version})", highlight=False, soft_wrap=True
        )


def _rows(built: Build) -> Iterator[tuple[str, str, str, str, str]]:
    for item in built.graphs:
        seen = item.quality
        yield (
            f"graph {item.precision}",
            f"{item.bytes / 1e6:.1f} MB",
            f"{seen.mean_cosine:.5f}",
            f"{seen.worst_cosine:.5f}",
            seen.executor,
        )
    if built.served is not None:
        seen = built.served
        name = f"service {built.spec.precision.cpu}"
        yield name, "", f"{seen.mean_cosine:.5f}", f"{seen.worst_cosine:.5f}", seen.executor
    for engine in built.engines:
        made = f"{engine.flavour} {engine.version}, built in {engine.build_seconds} s"
        yield f"engine {engine.target} {engine.precision}", f"{engine.bytes / 1e6:.1f} MB", "", "", made


def build_json(built: Build) -> dict[str, Any]:
    """The same for programs; digests included."""
    return {
        "spec": {"name": built.spec.name, "digest": built.spec.digest},
        "platform": built.platform,
        "checkpoint": {**built.checkpoint.model_dump(mode="json"), "digest": built.checkpoint.digest},
        "graphs": [{**item.model_dump(mode="json"), "digest": item.digest} for item in built.graphs],
        "served_quality": built.served.model_dump(mode="json") if built.served else None,
        "engines": [{**item.model_dump(mode="json"), "digest": item.digest} for item in built.engines],
        "repository": built.entry.model_dump(mode="json") if built.entry else None,
    }
