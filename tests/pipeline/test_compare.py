"""One model against another: the same texts, intervals, and a word only where these allow it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from builders.commands.compressing import compare
from builders.errors import InputError
from tests.compress.tiny import compressing
from tests.conftest import save_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


def _spec(folder: Path, source: Path, **changes: object) -> str:
    """A spec file that prunes half of the model."""
    spec = compressing(source, [{"prune": {"amount": 0.5, "importance": "magnitude"}}])
    file = folder / "smaller.yaml"
    file.write_text(yaml.safe_dump({**spec.model_dump(mode="json", exclude_defaults=True), **changes}))
    return str(file)


def test_a_spec_against_the_folder_that_it_starts_from(
    tiny_bert: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = _spec(tmp_path, tiny_bert)
    compare(str(tiny_bert), smaller, build_dir=root, as_json=True)
    found = json.loads(capsys.readouterr().out)
    first, second = found["sides"]
    assert first["quality"]["worst_cosine"] > 0.99999
    assert second["quality"]["mean_cosine"] < 0.999
    low, high = second["intervals"]["mean_cosine"].values()
    assert low < second["quality"]["mean_cosine"] < high
    said = {each["figure"]: each for each in found["differences"]}
    assert said["weights"]["verdict"] == said["FLOPs a token"]["verdict"] == "smaller"
    assert (
        said["MRR"]["interval"][0] <= said["MRR"]["candidate"] - said["MRR"]["reference"] <= said["MRR"]["interval"][1]
    )
    for each in found["differences"]:
        neutral = 1.0 if each["figure"].startswith("x ") else 0.0
        if each["interval"] is not None and each["interval"][0] <= neutral <= each["interval"][1]:
            assert each["verdict"] == "no difference shown"
    compare(str(tiny_bert), smaller, build_dir=root)
    text = capsys.readouterr().out
    assert "B against A: weights" in text
    assert "MFLOP/token" in text


def test_labels_of_classifiers(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (save_tiny(tmp_path / str(seed), "bert", "classification", seed=seed) for seed in (0, 1))
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"{number % 3}\tsome text about {number} things\n" for number in range(60)))
    options = {"task": "classification", "max_length": 64, "build_dir": root}
    compare(str(first), str(second), labels=labels, as_json=True, **options)  # type: ignore[arg-type]
    found = json.loads(capsys.readouterr().out)
    assert found["labelled"]["texts"] == 60
    assert found["labelled"]["accuracy_difference"]["low"] <= 0 <= found["labelled"]["accuracy_difference"]["high"]
    assert 0 <= found["labelled"]["agreement"] <= 1
    assert found["sides"][1]["retrieval"] is None
    compare(str(first), str(second), labels=labels, **options)  # type: ignore[arg-type]
    assert "accuracy" in capsys.readouterr().out


def test_what_cannot_be_compared(tiny_bert: Path, tmp_path: Path, root: Path) -> None:
    smaller = _spec(tmp_path, tiny_bert)
    with pytest.raises(InputError, match="leave these options out"):
        compare(smaller, smaller, task="embedding", build_dir=root)
    with pytest.raises(InputError, match=r"compare: model\.task: got embedding in .* and classification in"):
        compare(smaller, str(tiny_bert), task="classification", build_dir=root)
    with pytest.raises(InputError, match=r"--labels: got task embedding"):
        compare(smaller, str(tiny_bert), labels=tmp_path / "none", build_dir=root)
    (tmp_path / "b").mkdir()
    other = _spec(tmp_path / "b", tiny_bert, precision={"cpu": "fp32", "calibration_samples": 64})
    with pytest.raises(InputError, match=r"precision\.calibration_samples: got 32 in .* and 64 in"):
        compare(smaller, other, build_dir=root)
