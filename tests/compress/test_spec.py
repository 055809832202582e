"""What `compress` and `budget` may say, and what a model cannot give: refused by name, before a weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from builders.checkpoint.widths import LayerWidths, Widths
from builders.compress.plan import check
from builders.errors import SpecError
from builders.spec import DeploymentSpec, StepSlice, load_spec

MODEL = {"source": "packaged:all-MiniLM-L6-v2", "task": "embedding"}
WIDTHS = Widths(model_type="bert", hidden=384, head_size=32, layers=(LayerWidths(heads=12, ffn=1536),) * 6)


def _load(tmp_path: Path, **changes: object) -> DeploymentSpec:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump({"name": "a", "model": MODEL, **changes}))
    return load_spec(file)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"prune": {"amount": 1.0}}, "compress.0.prune.amount: got 1.0; expected less than 1"),
        ({"prune": {"amount": 0}}, "compress.0.prune.amount"),
        ({"prune": {"amount": -0.5}}, "compress.0.prune.amount"),
        ({"prune": {"amuont": 0.3}}, "did you mean 'amount'?"),
        ({"prun": {"amount": 0.3}}, "compress.0.prun: got an unknown key; expected one of"),
        ({}, "a step is one technique, not 0"),
        ({"prune": {"amount": 0.3}, "low_rank": {"rank": 8}}, "a step is one technique, not 2"),
        ({"prune": {}}, "amount or heads is needed to say how many heads stay"),
        ({"prune": {"what": [], "amount": 0.3}}, "compress.0.prune.what"),
        ({"prune": {"what": ["heads", "heads"], "amount": 0.3}}, "names one twice"),
        ({"prune": {"what": ["ffn"], "heads": 8, "amount": 0.3}}, "does not hold heads"),
        ({"prune": {"heads": 8, "ffn": 1088, "amount": 0.3}}, "amount says nothing"),
        ({"prune": {"what": ["layers"], "keep_layers": [2, 0]}}, "in rising order"),
        ({"prune": {"amount": 0.3, "importance": "taylor"}}, "importance=taylor needs labels"),
        ({"prune": {"amount": 0.3, "importance": "taylor", "labels": "x.tsv"}}, "labelled texts of a classifier"),
        ({"prune": {"amount": 0.3, "labels": "x.tsv"}}, "labels says nothing to importance=gauss_newton"),
        ({"prune": {"amount": 0.3, "refit": "least_squares", "refit_tokens": 5000}}, "refit_tokens"),
        ({"low_rank": {}}, "rank=auto needs amount"),
        ({"low_rank": {"rank": 8, "amount": 0.3}}, "a number takes none"),
        ({"low_rank": {"rank": 0}}, "compress.0.low_rank.rank"),
        ({"cluster": {"bits": 9}}, "compress.0.cluster.bits"),
        ({"cluster": {"per": "block"}}, "per=block needs block"),
        ({"cluster": {"block": 32}}, "other values take none"),
        ({"cluster": {"what": ["words", "words"]}}, "names one twice"),
        ({"sparsify": {"pattern": "unstructured"}}, "pattern=unstructured needs amount"),
        ({"sparsify": {"amount": 0.5}}, "2:4 takes none"),
        ({"sparsify": {"pattern": "unstructured", "amount": 1.0}}, "compress.0.sparsify.amount"),
    ],
)
def test_steps_that_make_no_sense(tmp_path: Path, step: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        _load(tmp_path, compress=[step])
    assert said in str(caught.value)


def test_what_goes_with_what(tmp_path: Path) -> None:
    steps = [{"prune": {"amount": 0.3}}]
    with pytest.raises(SpecError, match="budget says nothing without steps of compress"):
        _load(tmp_path, budget={"min_mean_cosine": 0.9})
    with pytest.raises(SpecError, match=r"compress is built for encoders and for .*, not for seq2seq"):
        _load(tmp_path, compress=steps, model={"source": "x", "task": "seq2seq"})
    with pytest.raises(SpecError, match=r"min_mrr_ratio says nothing to model.task=reranking"):
        _load(tmp_path, compress=steps, budget={"min_mrr_ratio": 0.9}, model={"source": "x", "task": "reranking"})
    plain, smaller = _load(tmp_path), _load(tmp_path, compress=steps)
    assert plain.digest != smaller.digest == _load(tmp_path, compress=steps, budget={"min_speedup": 1.5}).digest


def test_labels_start_at_the_spec(tmp_path: Path) -> None:
    step = {"prune": {"amount": 0.3, "importance": "taylor", "labels": "labels.tsv"}}
    taught = {"distil": {"tokens": 9, "losses": {"hard_labels": 1.0}, "labels": "labels.tsv"}}
    spec = _load(tmp_path, compress=[step, taught], model={"source": "x", "task": "classification"})
    assert spec.compress[0].prune is not None
    assert spec.compress[0].prune.labels == tmp_path.resolve() / "labels.tsv"
    assert spec.compress[1].distil is not None
    assert spec.compress[1].distil.labels == tmp_path.resolve() / "labels.tsv"


@pytest.mark.parametrize(
    ("steps", "tensor", "said"),
    [
        (
            [{"prune": {"what": ["layers"], "keep_layers": [0, 6]}}],
            1,
            "0.prune.keep_layers: got 6; expected numbers of",
        ),
        ([{"prune": {"what": ["layers"], "keep_layers": [0, 1, 2, 3, 4, 5]}}], 1, "got 6 of 6 layers that stay"),
        ([{"prune": {"what": ["heads"], "heads": 7}}], 2, "0.prune.heads: got 7; expected a multiple of 2"),
        ([{"prune": {"what": ["heads"], "heads": 13}}], 1, "under 12. Fix: use 12"),
        ([{"prune": {"what": ["heads"], "amount": 0.5}}], 5, "got 12 heads in a layer; expected a multiple of 5"),
        ([{"prune": {"what": ["ffn"], "ffn": 1000}}], 2, "0.prune.ffn: got 1000; expected a multiple of 16"),
        ([{"prune": {"what": ["ffn"], "amount": 0.0004}}], 1, "enough to take out some of the 9216 ffn"),
        ([{"low_rank": {"rank": 308}}], 1, "0.low_rank.rank: got 308; expected at most 307"),
        ([{"low_rank": {"rank": 193, "parts": "attention"}}], 1, "at most 192"),
        ([{"low_rank": {"rank": 99}}, {"low_rank": {"rank": 9, "parts": "all"}}], 1, "ffn_in of layer 0, which is a"),
        ([{"prune": {"what": ["ffn"], "ffn": 768}}, {"low_rank": {"rank": 300}}], 1, "1.low_rank.rank: got 300"),
        ([{"cluster": {}}, {"prune": {"amount": 0.5}}], 1, "compress.0.cluster: got a step behind it"),
        ([{"cluster": {"per": "block", "block": 100}}], 1, "0.cluster.block: got 100; expected what divides the rows"),
        ([{"cluster": {"per": "block", "block": 16, "bits": 5}}], 1, "got 5 bits for 16 weights that share a codebook"),
        ([{"low_rank": {"rank": 10}}, {"sparsify": {}}], 1, "1.sparsify.pattern: got 2:4 with 10 inputs of a matrix"),
        (
            [
                {"prune": {"what": ["layers"], "keep_layers": [0, 2]}},
                {"prune": {"what": ["layers"], "keep_layers": [2]}},
            ],
            1,
            "1.prune.keep_layers: got 2; expected numbers of the 2 layers",
        ),
    ],
)
def test_what_a_model_cannot_give(steps: list[dict[str, object]], tensor: int, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        check([StepSlice.model_validate(step) for step in steps], WIDTHS, tensor)
    assert said in str(caught.value)


def test_what_a_model_can_give() -> None:
    steps: list[dict[str, object]] = [
        {"prune": {"what": ["layers"], "amount": 0.5}},
        {"prune": {"heads": 8, "ffn": 1088}},
        {"low_rank": {"rank": 256}},
        {"low_rank": {"rank": 96, "parts": "attention"}},
        {"prune": {"what": ["heads"], "amount": 0.3}},
        {"sparsify": {}},
        {"cluster": {}},
    ]
    check([StepSlice.model_validate(step) for step in steps], WIDTHS, 2)
