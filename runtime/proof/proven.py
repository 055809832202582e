"""What a proof has shown, for people and programs, and its way to Triton's metrics page.

The launcher knows the figures, and Triton's page is written by Triton and its Python models alone. Every version has
such a model (the tokenizer of an encoder, the generator), so the launcher leaves the figures in the model repository,
beside the server's settings, and that model puts them on the page: one page, whatever executes the rest. A file of
another server, of before or beside, names another process and is not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from runtime.proof.judging import Figure
from runtime.settings import ServedModel, ServerSettings, Settings

PROVEN_FILE = "proven.json"


class ProvenFigure(Settings):
    """`limit` is the least or the most (`bound`) that the budget allows."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    value: float
    limit: float
    bound: str


class Proven(Settings):
    """A version that reproduced the reference's outputs on this machine. `server`: Triton's process."""

    model: str
    version: int
    figures: tuple[ProvenFigure, ...]
    inputs: str  # "16 texts"
    seconds: float
    server: int = 0

    @staticmethod
    def of(settings: ServerSettings, figures: Sequence[Figure], inputs: str, seconds: float) -> Proven:
        return Proven(
            model=settings.ensemble,
            version=settings.version,
            figures=tuple(ProvenFigure(name=f.name, value=f.value, limit=f.limit, bound=f.bound) for f in figures),
            inputs=inputs,
            seconds=round(seconds, 3),
        )

    def __str__(self) -> str:
        """`mean cosine 0.99872, worst cosine 0.99598 (16 texts, 0.4 s)`."""
        figures = ", ".join(f"{figure.name} {figure.value:.5f}" for figure in self.figures)
        return f"{figures} ({self.inputs}, {self.seconds:.1f} s)"


def write_proven(repository: Path, proven: Proven) -> None:
    """Raises OSError where the repository cannot be written."""
    partial = repository / f".{PROVEN_FILE}.partial"
    partial.write_text(proven.model_dump_json() + "\n")
    partial.replace(repository / PROVEN_FILE)


class ProvenExporter:
    """Puts the figures of one served version into Triton's metrics. `family` is `pb_utils.MetricFamily`."""

    def __init__(self, family: Any, served: ServedModel, repository: Path, server: int) -> None:
        self._family, self._served, self._server = family, served, server
        self._file, self._seen = repository / PROVEN_FILE, 0
        self._metrics: dict[tuple[str, str], Any] = {}
        self._families: dict[str, Any] = {}

    def look(self) -> None:
        """Cheap when nothing has changed."""
        with contextlib.suppress(OSError, ValueError):  # not there yet, or being written by another release
            changed = self._file.stat().st_mtime_ns
            if changed == self._seen:
                return
            self._seen = changed
            found = Proven.model_validate_json(self._file.read_text())
            mine = (found.model, found.version, found.server)
            if mine == (self._served.ensemble, self._served.version, self._server):
                self._export(found)

    def _export(self, found: Proven) -> None:
        for figure in found.figures:
            self._set("trireme_proof_value", "What the proof measured on this machine", figure.name, figure.value)
            self._set("trireme_proof_limit", "What the budget allows of it", figure.name, figure.limit)
        self._set("trireme_proof_seconds", "How long the proof took", "", found.seconds)

    def _set(self, name: str, description: str, figure: str, value: float) -> None:
        if (name, figure) not in self._metrics:
            if name not in self._families:
                self._families[name] = self._family(name=name, description=description, kind=self._family.GAUGE)
            labels = {"model": self._served.ensemble, "version": str(self._served.version)}
            labels |= {"figure": figure} if figure else {}
            self._metrics[name, figure] = self._families[name].Metric(labels=labels)
        self._metrics[name, figure].set(value)
