"""What a person sees of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from builders.training.recipe import TrainingProgress

_PLAIN_LINES = 20  # where standard error is no terminal


@contextmanager
def training_progress(quiet: bool = False) -> Iterator[Callable[[TrainingProgress], None]]:
    """A bar over the steps with both losses and the time left; plain lines where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield _lines(console.print)
        return
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(24),
        TextColumn("{task.fields[steps]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("train", total=1.0, detail="", steps="")
        yield lambda progress: bars.update(
            task, completed=progress.share, steps=_steps(progress), detail=losses_text(progress)
        )


def _lines(show: Callable[[str], None]) -> Callable[[TrainingProgress], None]:
    shown = 0

    def line(progress: TrainingProgress) -> None:
        nonlocal shown
        due = math.floor(progress.share * _PLAIN_LINES + 1e-9)
        if due > shown:
            shown = due
            show(f"train       {_steps(progress)} {losses_text(progress)}")

    return line


def _steps(progress: TrainingProgress) -> str:
    """Where time is the bound, nobody knows yet how many there will be."""
    return f"{progress.step}/{progress.steps}" if progress.steps is not None else f"{progress.share:.0%}"


def losses_text(progress: TrainingProgress) -> str:
    held_out = "" if progress.held_out_loss is None else f", held out {progress.held_out_loss:.3g}"
    return f"loss {progress.loss:.3g}{held_out}"
