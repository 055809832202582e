"""What several commands share: arguments of the same meaning, a spinner, and the way to fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from rich.status import Status

PlatformName = Literal["cpu", "gpu"]
SpecArgument = Annotated[str, typer.Argument(help="spec file, or the name of a preset (minilm)")]
BuildDir = Annotated[Path, typer.Option(help="where all output goes")]
PlatformOption = Annotated[PlatformName, typer.Option(help="cpu: OpenVINO or ONNX Runtime; gpu: TensorRT engines")]
JsonFlag = Annotated[bool, typer.Option("--json", help="print the result as JSON, for programs")]
DEFAULT_BUILD = Path("build")


def status(message: str, quiet: bool) -> Status:
    """A spinner on standard error while something takes its time."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet).status(message)


def fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
