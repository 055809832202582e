"""What a person sees of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from builders.training.recipe import TrainingProgress

_PLAIN_LINES = 20  # where standard error is no terminal


@contextmanager
def training_progress(quiet: bool = False) -> Iterator[Callable[[TrainingProgress], None]]:
    """A bar over the steps with both losses and the time left; plain lines where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        yield lambda progress: _print(console.print, progress)
        return
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("train", total=None, detail="")
        yield lambda progress: bars.update(
            task, total=progress.steps, completed=progress.step, detail=_losses(progress)
        )


def _print(show: Callable[[str], None], progress: TrainingProgress) -> None:
    if progress.step % max(1, progress.steps // _PLAIN_LINES) == 0 or progress.step == progress.steps:
        show(f"train       {progress.step}/{progress.steps} {_losses(progress)}")


def _losses(progress: TrainingProgress) -> str:
    held_out = "" if progress.held_out_loss is None else f", held out {progress.held_out_loss:.2f}"
    return f"loss {progress.loss:.2f}{held_out}"
