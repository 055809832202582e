"""The proof of a version: its arithmetic, what a port that lies or dawdles comes to, and files that are not its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders.artifacts import file_digest
from builders.errors import QualityError
from builders.judging.proof import _first_within
from runtime.errors import BadEnvironment, NotProven, ProofOverdue
from runtime.proof.judging import EncoderBudget, Figure, encoder_figures, generator_figures, spent, within
from runtime.proof.proven import Proven, ProvenExporter, write_proven
from runtime.proof.proving import Prover, Watch, measure
from runtime.proof.record import PROOF_FILE, EncoderProof, GeneratorProof, ProofRow, load_proof
from runtime.server.health import Health
from runtime.server.supervise import Failure
from runtime.settings import ServedModel, ServerSettings

BUDGET = EncoderBudget(0.998, 0.98, by_label=False)
VECTORS = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def _encoder_proof(**changes: Any) -> EncoderProof:
    values: dict[str, Any] = {
        "inputs": ("text",), "output": "embedding", "by_label": False, "rows_per_request": 4,
        "texts": tuple((f"text {number}",) for number in range(16)),
        "reference": tuple(map(tuple, VECTORS.tolist())), "min_mean_cosine": 0.998, "min_worst_cosine": 0.98,
    }  # fmt: skip
    return EncoderProof(**values | changes)


def _generator_proof() -> GeneratorProof:
    rows = [ProofRow(prompt=f"prompt {n}", output=(n, n + 1), logprobs=(-1.0, -2.0 - n)) for n in range(5)]
    return GeneratorProof(rows=tuple(rows), at_once=2, max_perplexity_ratio=1.03)


@dataclass
class FakePort:
    """Gives the reference's own outputs, changed by `change`. Each call takes `seconds` of the clock."""

    proof: EncoderProof | GeneratorProof
    change: Any = staticmethod(lambda values: values)
    seconds: float = 0.0
    now: float = 0.0
    asked: list[int] = field(default_factory=list)

    def vectors(self, proof: EncoderProof, rows: Sequence[int], timeout_s: float) -> NDArray[np.float32]:
        self.now += self.seconds
        self.asked.append(len(rows))
        found: NDArray[np.float32] = self.change(np.array([proof.reference[row] for row in rows], np.float32))
        return found

    def logprobs(self, rows: Sequence[ProofRow], timeout_s: float) -> Iterator[tuple[int, list[float]] | None]:
        self.asked.append(len(rows))
        for place, row in reversed(list(enumerate(rows))):  # answers come in any order
            self.now += self.seconds
            yield None
            yield place, self.change(list(row.logprobs))

    def watch(self, **options: Any) -> Watch:
        return Watch(clock=lambda: self.now, **options)


@pytest.mark.parametrize(
    ("change", "sound"),
    [
        (lambda v: v, True),
        (lambda v: v * 3, True),  # a cosine has no scale
        (lambda v: np.clip(v, -0.5, 0.5), False),  # saturation
        (lambda v: np.ones_like(v), False),  # what numpy 2 makes of tensors
        (lambda v: v[:, ::-1], False),
        (lambda v: v[:, :-1], False),
        (lambda v: np.where(v == v.max(), np.nan, v), False),
        (lambda v: np.vstack([-v[:1], v[1:]]), False),  # one text of many
    ],
)
def test_what_an_encoder_may_give(change: Any, sound: bool) -> None:
    assert within(encoder_figures(VECTORS, change(VECTORS), BUDGET)) is sound
    proof = _encoder_proof()
    port = FakePort(proof, change)
    assert within(measure(proof, port, port.watch())) is sound
    assert port.asked == [4, 4, 4, 4]


def test_scores_are_compared_label_by_label() -> None:
    """All scores near each other: their vectors are alike whatever the model says, their labels are not."""
    scores = VECTORS + 100
    shuffled = scores[::-1]
    assert within(encoder_figures(scores, shuffled, BUDGET))
    assert not within(encoder_figures(scores, shuffled, EncoderBudget(0.998, 0.98, by_label=True)))


@pytest.mark.parametrize(
    ("difference", "sound"),
    [
        ([0.0] * 100, True),
        ([0.02] * 100, True),
        ([0.04] * 100, False),  # over ln 1.03
        ([-0.1] * 100, True),  # better than the reference, and not by much
        ([1.0, -1.0] * 50, False),  # errors that cancel in the mean
        ([math.nan] + [0.0] * 99, False),
        ([0.0] * 99, False),  # a token less
    ],
)
def test_what_a_generator_may_give(difference: list[float], sound: bool) -> None:
    reference = [-2.0] * 100
    figures = generator_figures(reference, [-2.0 - item for item in difference], 1.03)
    assert within(figures) is sound
    assert (spent(figures) <= 1) is sound


def test_rows_of_a_generator_find_their_places() -> None:
    proof = _generator_proof()
    port = FakePort(proof)
    assert [figure.value for figure in measure(proof, port, port.watch())] == [1.0, 0.0]
    assert port.asked == [2, 2, 1], "no more at once than the queue takes"
    figures = measure(proof, FakePort(proof, lambda values: values[::-1]), Watch())
    assert not within(figures)


@pytest.mark.parametrize("proof", [_encoder_proof(), _generator_proof()], ids=["encoder", "generator"])
def test_a_proof_ends_in_time(proof: EncoderProof | GeneratorProof) -> None:
    port, said = FakePort(proof, seconds=15.0), list[str]()
    with pytest.raises(ProofOverdue, match=r"the proof has \d+ of (16|5) rows after 45 s"):
        measure(proof, port, port.watch(limit_s=40.0, report=said.append))
    assert said, "a proof that takes long is seen to move"
    with pytest.raises(ProofOverdue, match=r"after 0 s"):
        measure(proof, FakePort(proof), Watch(stopped=lambda: True))


def _published(folder: Path, proof: EncoderProof, version: int = 1) -> ServerSettings:
    directory = folder / "tiny" / str(version)
    directory.mkdir(parents=True)
    (directory / PROOF_FILE).write_text(proof.model_dump_json())
    return ServerSettings(
        ensemble="tiny", models=("tiny",), version=version, response_cache_bytes=0, rate_limited=False,
        content_digest="c", proof_digest=file_digest(directory / PROOF_FILE),
    )  # fmt: skip


def test_a_proof_that_is_not_the_versions_own(tmp_path: Path) -> None:
    settings = _published(tmp_path, _encoder_proof())
    file = tmp_path / "tiny" / "1" / PROOF_FILE
    assert load_proof(tmp_path, settings) == _encoder_proof()
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(BadEnvironment, match=r"proof\.json: digest \w{12}, and \w{12} was published with version 1"):
        load_proof(tmp_path, settings)
    file.write_text(_encoder_proof(min_mean_cosine=0.0).model_dump_json())  # a wider budget than was published
    with pytest.raises(BadEnvironment, match="trireme build"):
        load_proof(tmp_path, settings)
    file.unlink()
    with pytest.raises(BadEnvironment, match=r"proof\.json: No such file or directory; run `trireme build` again"):
        load_proof(tmp_path, settings)
    file.write_text(json.dumps({"kind": "encoder", "texts": [["a"]]}))
    with pytest.raises(BadEnvironment, match="not a proof of this release"):
        load_proof(tmp_path, settings.model_copy(update={"proof_digest": file_digest(file)}))


def test_a_version_of_an_earlier_release_is_refused_by_name(tmp_path: Path) -> None:
    settings = _published(tmp_path, _encoder_proof())
    data = settings.model_dump(mode="json", exclude={"proof_digest"})  # as that release wrote it
    (tmp_path / "settings.json").write_text(json.dumps(data))
    with pytest.raises(BadEnvironment, match="version 1 of tiny carries no proof: an earlier release published"):
        load_proof(tmp_path, ServerSettings.load(tmp_path))


def test_the_prover_proves_each_version_once(tmp_path: Path) -> None:
    published = {version: _published(tmp_path, _encoder_proof(), version) for version in (1, 2)}
    ports = {1: FakePort(_encoder_proof()), 2: FakePort(_encoder_proof(), np.ones_like)}
    prover = Prover(tmp_path, lambda settings: ports[settings.version], published.get, Watch())
    assert prover.prove(1) == published[1]
    assert prover.prove(1) is None
    with pytest.raises(NotProven, match=r"tiny version 2 is not proven on this machine: mean cosine -?0\.\d+ "):
        prover.prove(2)
    assert prover.prove(1) is None, "what was proven before still is"
    with pytest.raises(NotProven, match="version 3 answers, which nobody published"):
        prover.prove(3)
    prover.forget()
    assert prover.prove(1) == published[1], "models that were loaded again"
    assert len(ports[1].asked) == 8


def test_unproven_is_unready_at_once_and_says_so_while_it_drains() -> None:
    health = Health()
    health.observed(None)
    assert health.ready() is None
    health.observed(Failure("mean cosine 0.9", wrong=True))
    assert health.ready() == "mean cosine 0.9"
    health.drain()
    assert health.ready() == "mean cosine 0.9"


class FakeFamily:
    """`pb_utils.MetricFamily`, as far as it is used."""

    GAUGE = "gauge"
    values: dict[str, float]

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name

    def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802 - Triton's name
        key, values = f"{self.name} {labels.get('figure', '')}".strip(), type(self).values

        class Metric:
            def set(self, value: float) -> None:
                values[key] = value

        return Metric()


def test_figures_reach_the_metrics_of_the_server_that_found_them(tmp_path: Path) -> None:
    FakeFamily.values = {}
    served = ServedModel(ensemble="tiny", version=1, precision="fp32", model_digest="m", spec_digest="s")
    exporter = ProvenExporter(FakeFamily, served, tmp_path, server=7)
    exporter.look()
    figures = (Figure("mean cosine", 0.9987, 0.998, "least", 1.0),)
    proven = Proven.of(_published(tmp_path, _encoder_proof()), figures, "16 texts", 0.5)
    for other in (proven, proven.model_copy(update={"server": 7, "version": 2})):
        write_proven(tmp_path, other)  # of another server, of another version
        exporter.look()
    assert not FakeFamily.values
    write_proven(tmp_path, proven.model_copy(update={"server": 7}))
    exporter.look()
    expected = {"trireme_proof_value mean cosine": 0.9987, "trireme_proof_limit mean cosine": 0.998}
    assert FakeFamily.values == {**expected, "trireme_proof_seconds": 0.5}


def _judged(*used: float) -> Any:
    proofs = dict(enumerate(used))
    figure = {number: (Figure("used", share, 1.0, "most", 0.0),) for number, share in proofs.items()}
    return _first_within(iter(proofs), figure.__getitem__)  # type: ignore[type-var]


def test_a_sample_is_as_fair_as_the_texts_that_it_is_of() -> None:
    """The graph was judged on all of them: a sample on which it fails by chance would refuse every machine."""
    assert _judged(0.5, 0.1) == 0
    assert _judged(1.4, 0.95, 0.89, 0.2) == 2
    assert _judged(1.4, 0.95, 0.97) == 1
    with pytest.raises(QualityError, match=r"no sample of the held-out texts is within the budget.*used 1\.10000"):
        _judged(1.4, 1.1, 1.2)
