"""What a user may write in a spec, and what they are told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from builders.errors import SpecError
from builders.spec import PRESETS, load_spec


def _minilm() -> dict[str, dict[str, object]]:
    return yaml.safe_load((PRESETS / "minilm.yaml").read_text())


def _load(tmp_path: Path, data: object) -> object:
    file = tmp_path / "spec.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_spec(file)


def test_presets_load_by_name_and_are_frozen() -> None:
    spec = load_spec("minilm")
    assert spec.model.max_length == 256
    with pytest.raises(ValidationError):
        spec.name = "other"


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    data = _minilm()
    same = _load(tmp_path, data)
    data["serving"]["queue_delay_us"] = 7
    other = _load(tmp_path, data)
    assert load_spec("minilm").digest == same.digest != other.digest  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"serving": {"max_batch": 8}}, "did you mean 'max_batch_size'?"),
        ({"parallel": {"tensor": 2}}, "needs serving.executor=onnxruntime"),
        ({"generation": {"slots": 3}}, "generation.slots=3 says nothing to model.task=embedding"),
        (
            {"precision": {"max_logit_error": 0.1}},
            "precision.max_logit_error=0.1 says nothing to model.task=embedding",
        ),
        ({"serving": {"max_batch_size": "many"}}, "serving.max_batch_size"),
        ({"serving": {"max_batch_size": 65}}, "fits no engine.profiles entry"),
        ({"serving": {"length_buckets": [16, 128]}}, "must end with model.max_length=256"),
        ({"serving": {"length_buckets": [64, 16, 256]}}, "must rise strictly"),
        ({"serving": {"response_cache_bytes": 10}}, "1048576"),
        ({"serving": {"executor": "onnxruntime"}, "precision": {"cpu": "bf16"}}, "needs serving.executor=openvino"),
        ({"engine": {"targets": ["8.9"]}}, "engine.targets.0"),
        (
            {"precision": {"cpu": "int9"}},
            "precision.cpu: got 'int9'; expected 'fp32', 'bf16',",
        ),
        (
            {"kubernetes": {"monitoring_labels": {"a": 3}}},
            "monitoring_labels.a: got 3; expected a valid string",
        ),
        ({"engine": {"targets": []}}, "engine.targets"),
        ({"model": {"task": "translation"}}, "model.task"),
        ({"model": {"task": "classification", "pooling": "mean"}}, "apply to task embedding"),
    ],
)
def test_a_wrong_value_is_named_with_its_cure(tmp_path: Path, change: dict[str, dict[str, object]], said: str) -> None:
    data = _minilm()
    for name, values in change.items():
        data.setdefault(name, {}).update(values)
    with pytest.raises(SpecError) as caught:
        _load(tmp_path, data)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_profiles_follow_the_serving_sizes_unless_given(tmp_path: Path) -> None:
    data = _minilm()
    del data["engine"]
    data["model"]["max_length"] = 512
    data["serving"] |= {"max_batch_size": 100, "length_buckets": [64, 512]}
    spec = _load(tmp_path, data)
    (profile,) = spec.engine_profiles  # type: ignore[attr-defined]
    assert profile.batch.holds(1, 100)
    assert profile.length.holds(1, 512)
    data["serving"] |= {"max_batch_size": 2}
    data["model"]["max_length"], data["serving"]["length_buckets"] = 8, [8]
    (profile,) = _load(tmp_path, data).engine_profiles  # type: ignore[attr-defined]
    assert (profile.batch.opt, profile.length.opt) == (2, 8)


def test_profile_range_must_rise(tmp_path: Path) -> None:
    data = _minilm()
    data["engine"]["profiles"] = [
        {"batch": {"min": 4, "opt": 2, "max": 64}, "length": {"min": 1, "opt": 8, "max": 256}}
    ]
    with pytest.raises(SpecError, match=r"min <= opt <= max does not hold for 4, 2, 64"):
        _load(tmp_path, data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", "line 2"),
        ("- a\n", "got list"),
        ("a: [1\n", "valid YAML"),
        ("", "got NoneType"),
        ("name: {{ name }}\n", "valid YAML"),
        ("name: 2026-13-45\n", "valid YAML"),
    ],
)
def test_a_file_that_is_no_spec(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        _load(tmp_path, text)


def test_a_missing_file_names_the_presets() -> None:
    with pytest.raises(SpecError, match="minilm"):
        load_spec("no-such-spec.yaml")


def test_relative_paths_start_at_the_spec(tmp_path: Path) -> None:
    data = _minilm()
    data["precision"]["calibration_texts"] = "texts.txt"
    assert _load(tmp_path, data).precision.calibration_texts == tmp_path.resolve() / "texts.txt"  # type: ignore[attr-defined]


def test_engines_for_rtx_have_one_profile(tmp_path: Path) -> None:
    data = _minilm()
    profiles = data["engine"]["profiles"]
    data["engine"]["profiles"] = [*profiles, *profiles]  # type: ignore[misc]
    with pytest.raises(SpecError, match="served with one profile"):
        _load(tmp_path, data)
    data["engine"]["flavour"] = "tensorrt"
    assert _load(tmp_path, data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"serving": {"instances": 2}}, "serving.instances=2 says nothing to model.task=generation"),
        ({"serving": {"response_cache_bytes": 1 << 20}}, "serving.response_cache_bytes"),
        ({"precision": {"cpu": "int8"}}, "precision.cpu=int8 does not go with model.task=generation"),
        ({"generation": {"cache_lengths": [64, 128]}}, "must rise strictly and end with model.max_length=256"),
        ({"generation": {"chunk_tokens": 8}}, "generation.chunk_tokens"),
        ({"generation": {"kept_prefixes": 0}}, "generation.kept_prefixes"),
    ],
)
def test_a_generator_that_cannot_be_served_as_said(
    tmp_path: Path, change: dict[str, dict[str, object]], said: str
) -> None:
    model = {"source": "./model", "task": "generation", "max_length": 256}
    with pytest.raises(SpecError) as caught:
        _load(tmp_path, {"name": "lm", "model": model, **change})
    assert said in str(caught.value)
