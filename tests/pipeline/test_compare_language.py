"""Two language models on the same tokens: perplexity, agreement, divergence and speed, with their intervals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from builders.commands.compressing import compare
from builders.errors import InputError
from builders.judging.language import perplexity_difference, perplexity_ratio_interval, side_by_side
from tests.generators import POSITIONS, save_generator


def test_figures_are_those_of_a_direct_computation() -> None:
    random = np.random.default_rng(0)
    rows = random.integers(0, 50, (6, 9))
    first, second = (random.standard_normal((9, 6, 50)) * 2 for _ in range(2))
    found = side_by_side(rows, lambda at, ids: first[at], lambda at, ids: second[at])
    sides = [torch.log_softmax(torch.tensor(logits[:-1]), dim=-1).transpose(0, 1) for logits in (first, second)]
    targets = torch.tensor(rows[:, 1:])
    losses = [torch.nn.functional.nll_loss(side.flatten(0, 1), targets.flatten(), reduction="none") for side in sides]
    assert np.allclose(found.reference_losses, losses[0].reshape(6, 8).mean(1))
    assert np.allclose(found.losses, losses[1].reshape(6, 8).mean(1))
    divergence = torch.nn.functional.kl_div(sides[1], sides[0], reduction="none", log_target=True).sum(-1).mean(1)
    assert np.allclose(found.divergence, divergence)
    assert np.allclose(found.agreement, (sides[0].argmax(-1) == sides[1].argmax(-1)).double().mean(1))
    ratio = perplexity_ratio_interval(found.reference_losses, found.losses)
    assert ratio.low < np.exp(found.losses.mean() - found.reference_losses.mean()) < ratio.high


def test_a_word_only_where_rows_allow_it() -> None:
    random = np.random.default_rng(0)
    losses = random.standard_normal(32) + 4
    much, little = losses + 0.2, losses + random.standard_normal(32)
    assert perplexity_difference(losses, much).against(0, more_is_better=False) == "worse"
    assert perplexity_difference(losses, little).against(0, more_is_better=False) == "no difference shown"
    assert perplexity_difference(losses, losses).against(0, more_is_better=False) == "no difference shown"


def test_what_is_not_a_number_agrees_with_nothing() -> None:
    rows = np.zeros((2, 3), np.int64)
    sound, broken = np.eye(2, 4), np.full((2, 4), np.nan)
    found = side_by_side(rows, lambda at, ids: sound, lambda at, ids: broken)
    assert not found.agreement.any()
    assert np.isinf(found.losses).all()
    assert np.isinf(found.divergence).all()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_generator(tmp_path_factory.mktemp("compared") / "llama", "llama")


def _spec(folder: Path, source: Path, **changes: object) -> str:
    file = folder / "spec.yaml"
    model = {"source": str(source), "task": "generation", "max_length": POSITIONS}
    file.write_text(yaml.safe_dump({"name": "writes", "model": model, **changes}))
    return str(file)


def test_a_spec_against_the_folder_that_it_starts_from(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounded = _spec(tmp_path, llama, precision={"cpu": "w8"})
    compare(str(llama), rounded, build_dir=tmp_path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    first, second = found["sides"]
    assert (first["served"], second["served"]) == ("fp32", "w8")
    assert first["agreement"] == 1
    assert first["perplexity_ratio"] == 1
    assert first["divergence"] == 0
    assert 0.8 < second["agreement"] < 1
    assert second["divergence"] > 0
    low, high = second["intervals"]["perplexity_ratio"].values()
    assert low <= second["perplexity_ratio"] <= high
    said = {each["figure"]: each for each in found["differences"]}
    assert said["bytes of the graph"]["verdict"] == "smaller"
    assert said["weights"]["verdict"] == "equal"
    assert set(said) == {"perplexity", "weights", "bytes stored", "bytes of the graph", "FLOPs a token", "x openvino"}
    compare(str(llama), rounded, build_dir=tmp_path)
    assert "B against A: perplexity" in capsys.readouterr().out


def test_language_models_that_cannot_be_compared(llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    spec = _spec(tmp_path, llama, precision={"cpu": "fp32"})
    with pytest.raises(InputError, match=r"compare: model\.task"):
        compare(spec, str(tiny_bert), task="embedding", build_dir=tmp_path)
    with pytest.raises(InputError, match="--labels: got a language model"):
        compare(spec, spec, labels=tmp_path / "none", build_dir=tmp_path)
    (tmp_path / "t5").mkdir()
    file = tmp_path / "t5" / "spec.yaml"
    model = {"source": "x/y", "task": "seq2seq", "max_length": 64}
    file.write_text(yaml.safe_dump({"name": "writes", "model": model}))
    with pytest.raises(InputError, match=r"compare: .*: got model\.task=seq2seq; .* not built for encoder-decoders"):
        compare(str(file), str(file), build_dir=tmp_path)
    other = shutil.copytree(llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    with pytest.raises(InputError, match="perplexities by other tokens cannot be compared"):
        compare(spec, str(other), build_dir=tmp_path)
