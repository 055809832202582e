"""Programs of a rank group in a folder: `ranks.json`, the pieces as ONNX files, and the ranks' weights beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from runtime.errors import BadEnvironment
from runtime.ranks.program import Communicate, RankGrid, RankProgram, RunGraph, Transfer

MANIFEST = "ranks.json"


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Piece(_Stored):
    kind: Literal["graph"] = "graph"
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Collective(_Stored):
    kind: Literal["collective"] = "collective"
    operation: str
    source: str
    target: str
    ranks: int


class _Program(_Stored):
    steps: tuple[_Piece | _Collective, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    received: tuple[tuple[str, int], ...]
    sent: tuple[tuple[str, int], ...]
    states: tuple[tuple[str, str], ...]
    session: tuple[tuple[str, str], ...]


class _Manifest(_Stored):
    tensor: int
    pipeline: int
    outputs: tuple[str, ...]
    programs: tuple[_Program, ...]


@dataclass(frozen=True)
class StoredPrograms:
    """What a group loads: a program for each process of the layout. `outputs` are those of the whole graph."""

    layout: RankGrid
    outputs: tuple[str, ...]
    programs: tuple[RankProgram, ...]

    def maker(self, output: str) -> int:
        """The first process that makes an output. Every rank of its stage makes the same."""
        return next(rank for rank, program in enumerate(self.programs) if output in program.outputs)

    def with_threads(self, threads: int) -> StoredPrograms:
        return replace(self, programs=tuple(replace(program, threads=threads) for program in self.programs))


def save_programs(stored: StoredPrograms, folder: Path) -> list[Path]:
    """Writes pieces and manifest into `folder`, and says which files these are. Weights are the caller's to bring."""
    written, described = [], []
    for rank, program in enumerate(stored.programs):
        steps: list[_Piece | _Collective] = []
        for index, step in enumerate(program.steps):
            if isinstance(step, RunGraph):
                file = folder / f"rank{rank}.piece{index}.onnx"
                file.write_bytes(step.model)
                written.append(file)
                steps.append(_Piece(file=file.name, inputs=step.inputs, outputs=step.outputs))
            else:
                steps.append(
                    _Collective(operation=step.operation, source=step.source, target=step.target, ranks=step.ranks)
                )
        described.append(
            _Program(
                steps=tuple(steps),
                inputs=program.inputs,
                outputs=program.outputs,
                received=tuple((transfer.value, transfer.stage) for transfer in program.received),
                sent=tuple((transfer.value, transfer.stage) for transfer in program.sent),
                states=program.states,
                session=program.session,
            )
        )
    manifest = _Manifest(
        tensor=stored.layout.tensor,
        pipeline=stored.layout.pipeline,
        outputs=stored.outputs,
        programs=tuple(described),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    return [*written, folder / MANIFEST]


def load_programs(manifest: Path) -> StoredPrograms:
    """Raises BadEnvironment for a manifest or a piece that is missing, damaged or of another release."""
    folder = manifest.parent
    try:
        stored = _Manifest.model_validate(json.loads(manifest.read_text()))
        programs = tuple(_program(item, folder) for item in stored.programs)
    except (OSError, ValueError) as error:
        raise BadEnvironment(
            f"{manifest}: missing, or not of this release; run `trireme build` again ({error})"
        ) from error
    layout = RankGrid(stored.tensor, stored.pipeline)
    if len(programs) != layout.ranks:
        raise BadEnvironment(
            f"{manifest}: {len(programs)} programs for {layout.ranks} ranks; run `trireme build` again"
        )
    return StoredPrograms(layout, stored.outputs, programs)


def _program(item: _Program, folder: Path) -> RankProgram:
    steps = tuple(
        RunGraph((folder / step.file).read_bytes(), step.inputs, step.outputs)
        if isinstance(step, _Piece)
        else Communicate(step.operation, step.source, step.target, step.ranks)
        for step in item.steps
    )
    return RankProgram(
        folder=str(folder.resolve()),
        steps=steps,
        inputs=item.inputs,
        outputs=item.outputs,
        received=tuple(Transfer(*pair) for pair in item.received),
        sent=tuple(Transfer(*pair) for pair in item.sent),
        states=item.states,
        session=item.session,
    )
