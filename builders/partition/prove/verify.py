"""`verify_partition`: every rank runs as a process, and the numbers must be those of the whole graph.

Fail closed: a partition passes only when all of this holds, and whatever fails is reported together.
    files      have the digests of the manifest
    plan       is the one that this graph leads to: placements, collectives, stages
    weights    of every rank are the source's own bytes, cut as the plan says, and no others are there
    graphs     of every rank are those that the plan makes: nodes, attributes, constants, types
    numbers    of every output, on every rank, for several batch sizes, lengths and steps
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Cut, Partition, file_digest
from builders.errors import CheckError, InputError, ParityError
from builders.partition.cut.shard import load_partition, ports
from builders.partition.placement import Block, spans
from builders.partition.prove.edges import edge_cases
from builders.partition.prove.feeds import Arrays, Case, cases, roles
from builders.partition.prove.plan_and_weights import plan_faults, weight_faults
from builders.partition.prove.programs import program_steps, read_rank
from builders.partition.prove.structure import structure_faults
from builders.partition.read import Source, read
from runtime.errors import ServerFault
from runtime.ranks.group import RankGroup
from runtime.ranks.program import RankGrid, RankProgram, Transfer
from runtime.record import Record
from runtime.session import open_session

MAX_RELATIVE = 1e-4  # fp32: largest difference over the largest value of the output
MIN_COSINE = 0.9999  # lower precisions: of each row of the batch
_NARROW = ("QuantizeLinear", "DynamicQuantizeLinear")
# ONNX Runtime rounds the activations of weight-only products to 8 bits; level 1 keeps them in fp32.
_SESSION = (("session.qdq_matmulnbits_accuracy_level", "1"),)
_STEP_SECONDS = 120.0
_SHOWN = 8  # faults that an error lists


class OutputCheck(Record):
    """The worst of an output over all ranks and steps of a case."""

    case: str
    output: str
    max_relative: float
    min_cosine: float


class VerifyReport(Record):
    """What was run, and how near it came. Bytes are weights; `per_token` is what a rank sends for one token."""

    tensor: int
    pipeline: int
    processes: int
    collectives: dict[str, int]
    rank_bytes: int
    ideal_bytes: int
    per_token_bytes: int
    exact: bool
    checks: tuple[OutputCheck, ...]
    seconds: float

    @property
    def max_relative(self) -> float:
        return max(check.max_relative for check in self.checks)

    @property
    def min_cosine(self) -> float:
        return min(check.min_cosine for check in self.checks)


def verify_partition(
    directory: Path,
    against: Path,
    *,
    samples: Sequence[Mapping[str, NDArray[Any]]] = (),
    seed: int | None = None,
    group: RankGroup | None = None,
) -> VerifyReport:
    """Runs all ranks of the partition and compares with the whole graph `against`.

    `samples` are real inputs, run beside fresh random ones; `seed` repeats a run; `group` are processes to use again.
    Raises InputError for files that cannot be read; ParityError when numbers differ; CheckError for every other fault.
    """
    begun = time.monotonic()
    partition = load_partition(directory)
    source = read(against)
    if ports(source) != (partition.inputs, partition.outputs):
        raise CheckError(
            f"partition {directory.name} has other inputs or outputs than {against.name}; it was made from "
            f"{partition.source_file}, digest {partition.source_digest[:12]}"
        )
    faults = _file_faults(partition)
    if not faults:
        faults, planned = plan_faults(partition, against)
        faults += [*weight_faults(partition, source), *structure_faults(partition, planned)]
    exact = not _narrow(source)
    checks: list[OutputCheck] = []
    try:
        checks = _run(partition, source, _cases(source, partition, samples, seed), group)
    except (CheckError, ServerFault, OSError, LookupError, ValueError) as error:  # a manifest may claim anything
        faults.insert(0, f"the ranks do not run: {error}")
    if not checks and not faults:
        faults.append("it has no output that could be compared")
    wrong = [check for check in checks if not _passes(check, exact)]
    if wrong:
        worst = max(wrong, key=lambda check: (not np.isfinite(check.max_relative), check.max_relative))
        where = ", ".join(dict.fromkeys(check.case for check in wrong))
        faults.insert(
            0,
            f"{len(wrong)} of {len(checks)} outputs differ, at {where}; the worst, {worst.output} at {worst.case}: "
            f"relative difference {worst.max_relative:.2e} (limit {MAX_RELATIVE:.0e}), cosine {worst.min_cosine:.6f}",
        )
    if faults:
        kind = ParityError if wrong else CheckError
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise kind(f"partition {directory.name} is not {against.name}: " + "; ".join(faults[:_SHOWN]) + more)
    counts = [item.operation for stage in partition.stages for item in stage.collectives]
    return VerifyReport(
        tensor=partition.tensor,
        pipeline=partition.pipeline,
        processes=partition.tensor * partition.pipeline,
        collectives={operation: counts.count(operation) for operation in sorted(set(counts))},
        rank_bytes=partition.rank_bytes,
        ideal_bytes=partition.ideal_bytes,
        per_token_bytes=partition.bytes_per_token,
        exact=exact,
        checks=tuple(checks),
        seconds=time.monotonic() - begun,
    )


def _passes(check: OutputCheck, exact: bool) -> bool:
    return check.max_relative <= MAX_RELATIVE if exact else check.min_cosine >= MIN_COSINE


def _narrow(source: Source) -> bool:
    """Whether the graph rounds on its way, so that sums in another order may round otherwise."""
    half = any(value.dtype is not None and value.dtype.name in ("FLOAT16", "BFLOAT16") for value in source.origin)
    return half or any(node.op_type in _NARROW for node in source.graph)


def _file_faults(partition: Partition) -> list[str]:
    faults = []
    for record in partition.files:
        path = partition.path(record.name)
        if not path.is_file():
            faults.append(f"{record.name} is missing")
        elif path.stat().st_size != record.bytes or file_digest(path) != record.sha256:
            faults.append(f"{record.name} is not the file that was written")
    listed = {record.name for record in partition.files}
    return faults + [
        f"{name} is not listed" for stage in partition.stages for name in stage.files if name not in listed
    ]


def _cases(
    source: Source, partition: Partition, samples: Sequence[Mapping[str, NDArray[Any]]], seed: int | None
) -> list[Case]:
    states = {given: made for made, given in partition.states}
    fresh = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    inputs = roles(source, states)
    zeros = {step_name: array for step_name, array in cases(inputs, fresh)[0].steps[0].items() if step_name in states}
    real = [Case(f"sample {index}", [{**zeros, **dict(sample)}]) for index, sample in enumerate(samples)]
    return [*cases(inputs, fresh), *edge_cases(source, inputs, partition.tensor, fresh), *real]


def _run(partition: Partition, source: Source, all_cases: list[Case], group: RankGroup | None) -> list[OutputCheck]:
    layout = RankGrid(partition.tensor, partition.pipeline)
    whole = _Whole(source.file, {given: made for made, given in partition.states})
    with ExitStack() as stack:
        ranks = group or stack.enter_context(RankGroup(layout.ranks))
        ranks.load(rank_programs(partition), layout)
        checks: list[OutputCheck] = []
        for case in all_cases:
            if case.optional and case.name in {check.case for check in checks}:
                continue
            try:
                checks += _run_case(partition, whole, case, ranks)
            except InputError:
                if not case.optional:
                    raise
        return checks


def rank_programs(partition: Partition) -> list[RankProgram]:
    """What each rank runs, by process number. Raises CheckError for graphs that cannot be parted."""
    programs = []
    for index, stage in enumerate(partition.stages):
        received = tuple(Transfer(port.name, port.from_stage) for port in stage.inputs if port.from_stage is not None)
        sent = tuple(Transfer(port.name, later) for later, other in enumerate(partition.stages)
                     for port in other.inputs if port.from_stage == index)  # fmt: skip
        made, used = [port.name for port in stage.outputs], [port.name for port in stage.inputs]
        elsewhere = {transfer.value for transfer in received}
        states = tuple((out, given) for out, given in partition.states if out in made and given in used)
        programs += [
            RankProgram(
                folder=str(partition.directory.resolve()),
                steps=program_steps(read_rank(partition.path(name))),
                inputs=tuple(name for name in used if name not in elsewhere),
                outputs=tuple(made),
                received=received,
                sent=sent,
                states=states,
                session=_SESSION,
            )
            for name in stage.files
        ]
    return programs


class _Whole:
    """The unsharded graph in ONNX Runtime: the reference."""

    def __init__(self, file: Path, states: Mapping[str, str]) -> None:
        try:
            self._session = open_session(file, entries=_SESSION)
        except Exception as error:  # one unrelated type for each status code of ONNX Runtime
            raise InputError(
                f"graph {file}",
                got=str(error).splitlines()[0],
                expected="a graph that ONNX Runtime loads: it is the reference",
                fix="export the graph again, or with a newer exporter",
            ) from error
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._states, self._held = states, Arrays()

    def forget(self) -> None:
        self._held = {}

    def step(self, feeds: Arrays) -> Arrays:
        try:
            results = dict(zip(self._outputs, self._session.run(None, {**self._held, **feeds}), strict=True))
        except Exception as error:  # one unrelated type for each status code of ONNX Runtime
            raise InputError(
                "inputs for the whole graph",
                got=str(error).splitlines()[0],
                expected="inputs that it accepts",
                fix="give samples of your own; the generated ones do not fit this graph",
            ) from error
        self._held = {given: results[made] for given, made in self._states.items()}
        return results


def _run_case(partition: Partition, whole: _Whole, case: Case, group: RankGroup) -> list[OutputCheck]:
    whole.forget()
    group.forget()
    worst: dict[str, OutputCheck] = {}
    states = {made for made, _ in partition.states}
    for index, feeds in enumerate(case.steps):
        expected = whole.step(feeds)
        last = index == len(case.steps) - 1
        fetch = [name for name in expected if last or name not in states]
        results = group.run(_rank_feeds(partition, feeds), fetch, seconds=_STEP_SECONDS)
        for check in _compare(partition, case.name, results, {name: expected[name] for name in fetch}):
            before = worst.get(check.output, check)
            worst[check.output] = check.model_copy(update={
                "max_relative": max(before.max_relative, check.max_relative),
                "min_cosine": min(before.min_cosine, check.min_cosine),
            })  # fmt: skip
    return list(worst.values())


def _rank_feeds(partition: Partition, feeds: Arrays) -> list[Arrays]:
    return [
        {
            port.name: cut_array(feeds[port.name], port.cut, rank, partition.tensor)
            for port in stage.inputs
            if port.name in feeds
        }
        for stage in partition.stages
        for rank in range(partition.tensor)
    ]


def cut_array(array: NDArray[Any], cut: Cut | None, rank: int, ranks: int) -> NDArray[Any]:
    """What `rank` holds of the array."""
    if cut is None:
        return array
    ranges = spans([Block(size, parts) for size, parts in cut.blocks], rank, ranks)
    indices = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    return np.asarray(array.take(indices, axis=cut.dim))


def _compare(partition: Partition, case: str, results: list[Arrays], expected: Arrays) -> list[OutputCheck]:
    """Every rank that makes an output is compared. An output that no rank makes differs without bound."""
    checks = []
    for name, whole in expected.items():
        differences, cosines = [], []
        for stage_index, stage in enumerate(partition.stages):
            port = next((port for port in stage.outputs if port.name == name), None)
            for rank in range(partition.tensor) if port is not None else ():
                result = results[stage_index * partition.tensor + rank].get(name)
                assert port is not None
                difference, cosine = _distance(cut_array(whole, port.cut, rank, partition.tensor), result)
                differences.append(difference)
                cosines.append(cosine)
        checks.append(
            OutputCheck(
                case=case,
                output=name,
                max_relative=max(differences, default=np.inf),
                min_cosine=min(cosines, default=-1.0),
            )
        )
    return checks


def _distance(expected: NDArray[Any], result: NDArray[Any] | None) -> tuple[float, float]:
    """Largest difference over the largest expected value, and the smallest cosine of a batch row."""
    if result is None or result.shape != expected.shape or not np.isfinite(result).all():
        return np.inf, -1.0
    a, b = expected.astype(np.float64), result.astype(np.float64)
    scale = max(float(np.abs(a).max(initial=0.0)), 1e-6)
    rows_a, rows_b = a.reshape(len(a) if a.ndim else 1, -1), b.reshape(len(b) if b.ndim else 1, -1)
    norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
    cosines = np.where(
        norms > 1e-12, (rows_a * rows_b).sum(axis=1) / np.maximum(norms, 1e-12), (rows_a == rows_b).all(axis=1)
    )
    return float(np.abs(a - b).max(initial=0.0)) / scale, float(cosines.min(initial=1.0))
