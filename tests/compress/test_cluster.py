"""Codebooks: k-means against a plain one, the codec there and back, and the folder that holds them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders.checkpoint import load_checkpoint
from builders.checkpoint.codebooks import FILE, CodedMatrix, pack, unpack
from builders.checkpoint.weights import CODEBOOKS
from builders.checkpoint.widths import FILE as WIDTHS_FILE
from builders.compress.cluster import codebooks, encode
from builders.compress.saving import save
from builders.errors import CheckpointError
from builders.export.weights import load_encoder
from builders.pipeline.judged import weight_bytes
from builders.spec import StepSlice
from tests.compress.tiny import Tiny
from tests.conftest import tiny_spec


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_indices_come_back_from_bytes(bits: int, numbers: list[int]) -> None:
    indices = np.array([number % 2**bits for number in numbers], np.uint8)
    packed = pack(indices, bits)
    assert packed.nbytes == math.ceil(len(numbers) * bits / 8)
    assert np.array_equal(unpack(packed, bits, len(numbers)), indices)


def _error(groups: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> float:
    nearest = (groups[:, :, None] - codes[:, None]).abs().min(2).values
    return float((weights * nearest.square()).sum())


def test_codes_are_no_worse_than_a_plain_search_of_all_cuts() -> None:
    """The least squared error by dynamic programming over all places to cut the sorted values."""
    groups = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3, 40, generator=torch.Generator().manual_seed(1))
    found = codebooks(groups, weights, 4)
    for row in range(3):
        order = groups[row].argsort()
        x, w = groups[row][order].double().numpy(), weights[row][order].double().numpy()

        def cost(start: int, stop: int, x: np.ndarray = x, w: np.ndarray = w) -> float:
            mean = (x[start:stop] * w[start:stop]).sum() / w[start:stop].sum()
            return float((w[start:stop] * (x[start:stop] - mean) ** 2).sum())

        best = [0.0] + [math.inf] * 40
        for _ in range(4):
            best = [0.0, *(min(best[start] + cost(start, stop) for start in range(stop)) for stop in range(1, 41))]
        assert _error(groups[row : row + 1], found[row : row + 1], weights[row : row + 1]) <= 1.35 * best[-1]


def test_weights_pull_the_codes() -> None:
    groups = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    weights = torch.where(groups > 0, 100.0, 0.01)
    ones = torch.ones_like(groups)
    assert _error(groups, codebooks(groups, weights, 4), weights) < _error(groups, codebooks(groups, None, 4), weights)
    assert _error(groups, codebooks(groups, None, 4), ones) < _error(groups, codebooks(groups, weights, 4), ones)


@pytest.mark.parametrize(
    "values",
    [[0.5] * 9, [0.0] * 9, [1.0, -2.0] * 4 + [1.0], [0.0] * 8 + [3.0], [-1.0, 0.0, 0.25, 4.0] * 2 + [4.0], [2.0]],
)
def test_no_more_values_than_codes_stay_as_they_are(values: list[float]) -> None:
    groups = torch.tensor([values, values[::-1]])
    codes = codebooks(groups, None, 4)
    assert _error(groups, codes, torch.ones_like(groups)) == 0
    indices, kept = encode(groups, CodedMatrix(shape=(2, len(values)), bits=2, group=len(values)))
    assert torch.equal(kept.gather(1, torch.from_numpy(indices.astype(np.int64)).reshape(2, -1)), groups)


def test_a_few_outliers_and_huge_values_are_kept_in_range() -> None:
    groups = torch.full((1, 64), 1e5)
    groups[0, ::2] = torch.linspace(-1e5, 1e5, 32)
    codes = codebooks(groups, None, 4)  # beyond what two bytes hold
    assert bool(torch.isfinite(codes).all())
    assert float(codes.max()) > 65504


def test_more_values_than_codes_are_no_codebook() -> None:
    with pytest.raises(ValueError, match="5 values in a group, and 4 codes"):
        encode(torch.arange(5.0)[None], CodedMatrix(shape=(1, 5), bits=2, group=5))


def _saved(source: Path, out: Path, *before: dict[str, dict[str, object]], **asked: object) -> tuple[Tiny, Path]:
    tiny = Tiny.of(source)
    for step in before:
        tiny.carry_out(step)
    step: dict[str, dict[str, object]] = {"cluster": {"tokens": 500, **asked}}
    tiny.carry_out(step)
    out.mkdir()
    save(tiny.model, tiny.checkpoint, tiny_spec(source).model, StepSlice.model_validate(step), [], out)
    return tiny, out


@pytest.mark.parametrize(
    "asked", [{}, {"per": "tensor", "bits": 3}, {"per": "block", "block": 16, "bits": 3, "weighted": "none"}]
)
def test_what_is_saved_is_what_loads(tiny_bert: Path, tmp_path: Path, asked: dict[str, object]) -> None:
    tiny, out = _saved(tiny_bert, tmp_path / "out", **asked)
    again = load_checkpoint(tiny_spec(out).model)
    assert np.array_equal(tiny.outputs(), Tiny(again, load_encoder(again)).outputs())
    assert again.parameters == sum(
        value.numel() for name, value in tiny.model.state_dict().items() if not name.startswith("pooler.")
    )
    matrices = json.loads((out / FILE).read_text())["matrices"]
    assert len(matrices) == 2 * 6 + 1
    counted = sum(math.prod(each["shape"]) for each in matrices.values()) * 4
    assert weight_bytes(tiny.checkpoint) - weight_bytes(again) > 0.5 * counted


def test_behind_other_steps_and_in_a_new_process(tiny_bert: Path, tmp_path: Path) -> None:
    prune: dict[str, dict[str, object]] = {"prune": {"amount": 0.4, "importance": "magnitude"}}
    factor: dict[str, dict[str, object]] = {"low_rank": {"rank": 8, "tokens": 500}}
    tiny, out = _saved(tiny_bert, tmp_path / "out", prune, factor)
    assert (out / WIDTHS_FILE).is_file()
    code = (
        "import sys, numpy as np; from pathlib import Path; from builders.checkpoint import load_checkpoint\n"
        "from builders.export.weights import load_encoder; from tests.compress.tiny import Tiny\n"
        "from tests.conftest import tiny_spec\n"
        "found = load_checkpoint(tiny_spec(Path(sys.argv[1])).model)\n"
        "np.save(sys.argv[2], Tiny(found, load_encoder(found)).outputs())"
    )
    file = tmp_path / "outputs.npy"
    subprocess.run([sys.executable, "-c", code, str(out), str(file)], check=True, timeout=300)
    assert np.array_equal(np.load(file), tiny.outputs())


def test_transformers_alone_does_not_take_it(tiny_bert: Path, tmp_path: Path) -> None:
    """It must not load the rest and make up what is coded."""
    import transformers

    _, out = _saved(tiny_bert, tmp_path / "out", weighted="none")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModel.from_pretrained(out)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (None, "got no such file"),
        ("{", "expected valid JSON"),
        ({"version": 2}, "version: Input should be 1"),
        ({"matrices": {}}, "no word of"),
        ({"bits": 5}, "of shape"),
        ({"bits": 9}, "bits: Input should be less"),
        ({"group": 7}, "weights in groups of 7"),
        ({"shape": [32, 16]}, "of shape"),
    ],
)
def test_a_damaged_manifest_is_refused(
    tiny_bert: Path, tmp_path: Path, damage: str | dict[str, object] | None, said: str
) -> None:
    _, out = _saved(tiny_bert, tmp_path / "out", weighted="none")
    file = out / FILE
    found = json.loads(file.read_text())
    if damage is None:
        file.unlink()
    elif isinstance(damage, str):
        file.write_text(damage)
    elif damage.keys() & found.keys():
        file.write_text(json.dumps({**found, **damage}))
    else:
        name = next(iter(found["matrices"]))
        found["matrices"][name] |= damage
        file.write_text(json.dumps(found))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tiny_spec(out).model)
    assert said in str(caught.value)


def test_both_kinds_of_weights_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    _, out = _saved(tiny_bert, tmp_path / "out", weighted="none")
    (out / "model.safetensors").write_bytes((tiny_bert / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=rf"{CODEBOOKS} and model.safetensors; expected one of them"):
        load_checkpoint(tiny_spec(out).model)
