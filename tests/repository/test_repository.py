"""Model repositories: what is generated, checked and published."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from builders import pipeline
from builders.checkpoint import load_checkpoint
from builders.errors import CheckError
from builders.pipeline import Build
from builders.repository import publish
from builders.repository.encoder_config import EncoderInterface, model_configs
from builders.repository.ensemble import check_ensemble
from builders.spec import DeploymentSpec, load_spec
from runtime.errors import BadEnvironment
from runtime.server.launch import load_server_settings
from runtime.settings import EncoderModelSettings, TokenizerModelSettings
from tests.conftest import tiny_spec
from tests.repository import golden_configs


def test_committed_configs_are_what_is_generated(minilm: Build) -> None:
    assert minilm.entry is not None
    expected = golden_configs.expected(minilm.entry.repository.parents[2])
    committed = {path: path.read_text() for path in golden_configs.MODEL_REPOSITORY.rglob("config.pbtxt")}
    assert committed.keys() == expected.keys(), "run `make golden`"
    for path, text in expected.items():
        assert committed[path] == text, f"{path.name} drifted; run `make golden` if the change is meant"


@pytest.fixture
def configs() -> dict[str, Any]:
    spec = load_spec("minilm")
    return model_configs(spec, "cpu", EncoderInterface.of(load_checkpoint(spec.model)))


def _step(configs: dict[str, Any], index: int) -> Any:
    return configs["minilm"].ensemble_scheduling.step[index]


def _retype(configs: dict[str, Any]) -> None:
    configs["minilm-encoder"].input[0].data_type = 7


def _redim(configs: dict[str, Any]) -> None:
    configs["minilm-encoder"].output[0].dims[:] = [768]


def _rerank(configs: dict[str, Any]) -> None:
    configs["minilm-tokenizer"].output[0].dims.append(2)


def _unfed(configs: dict[str, Any]) -> None:
    del _step(configs, 1).input_map["attention_mask"]


def _misnamed(configs: dict[str, Any]) -> None:
    _step(configs, 1).input_map["mask"] = "attention_mask"


def _unproduced(configs: dict[str, Any]) -> None:
    _step(configs, 1).input_map["attention_mask"] = "other_mask"


def _twice(configs: dict[str, Any]) -> None:
    _step(configs, 1).output_map["embedding"] = "token_count"


def _missing_model(configs: dict[str, Any]) -> None:
    _step(configs, 0).model_name = "no-such-model"


def _small_part(configs: dict[str, Any]) -> None:
    configs["minilm-encoder"].max_batch_size = 8


def _no_output(configs: dict[str, Any]) -> None:
    _step(configs, 1).output_map.clear()


@pytest.mark.parametrize(
    "damage",
    [_retype, _redim, _rerank, _unfed, _misnamed, _unproduced, _twice, _missing_model, _small_part, _no_output],
)
def test_every_wrong_edge_is_found_before_writing(configs: dict[str, Any], damage: Any) -> None:
    check_ensemble(configs["minilm"], configs)
    damaged = copy.deepcopy(configs)
    damage(damaged)
    with pytest.raises(CheckError, match="ensemble minilm: "):
        check_ensemble(damaged["minilm"], damaged)


def test_the_spec_reaches_the_configs() -> None:
    preset = load_spec("minilm")
    serving = {
        **preset.serving.model_dump(),
        "instances": 3,
        "queue_size": 5,
        "queue_timeout_us": 7,
        "response_cache_bytes": 1 << 20,
        "rate_limit": {"resource": "cpu", "count": 2, "priority": 1},
        "warmup": False,
    }
    spec = DeploymentSpec.model_validate({**preset.model_dump(), "serving": serving})
    interface = EncoderInterface.of(load_checkpoint(spec.model))
    cpu = model_configs(spec, "cpu", interface)
    encoder = cpu["minilm-encoder"]
    assert encoder.instance_group[0].count == 3
    assert encoder.instance_group[0].rate_limiter.resources[0].name == "cpu"
    assert encoder.dynamic_batching.default_queue_policy.default_timeout_microseconds == 7
    assert cpu["minilm"].parameters["queue_size"].string_value == "5"
    assert cpu["minilm"].response_cache.enable
    assert not model_configs(spec, "gpu", interface)["minilm-encoder"].model_warmup


def test_no_config_has_a_queue_policy_of_itself(configs: dict[str, Any]) -> None:
    """Triton 2.51 lets requests wait half a second now and then where there is one."""
    batched = [config for config in configs.values() if config.HasField("dynamic_batching")]
    assert len(batched) == 2
    assert not any(config.dynamic_batching.HasField("default_queue_policy") for config in batched)


def test_the_tensorrt_backend_picks_the_engine_by_gpu() -> None:
    spec = load_spec("minilm")
    spec = spec.model_copy(update={"engine": spec.engine.model_copy(update={"flavour": "tensorrt"})})
    encoder = model_configs(spec, "gpu", EncoderInterface.of(load_checkpoint(spec.model)))["minilm-encoder"]
    assert encoder.backend == "tensorrt"
    assert dict(encoder.cc_model_filenames)["12.0"] == "model.sm120.plan"
    assert list(encoder.instance_group[0].profile) == ["0"]


@pytest.fixture
def built(tiny_bert: Path, tmp_path: Path) -> Build:
    return pipeline.build(tiny_spec(tiny_bert), "cpu", tmp_path, "repository")


def _publish(built: Build, **serving: object) -> Any:
    assert built.entry is not None
    changed = built.spec.model_copy(update={"serving": built.spec.serving.model_copy(update=serving)})
    assert built.proof is not None
    parts = [built.served_graph]
    return publish.publish(changed, "cpu", built.checkpoint, parts, built.entry.repository, proof=built.proof)


def _versions(repository: Path, model: str) -> list[str]:
    return sorted(path.name for path in (repository / model).iterdir() if path.is_dir())


def test_a_change_is_a_new_version_and_no_change_is_none(built: Build) -> None:
    assert built.entry is not None
    repository = built.entry.repository
    entry, unchanged = _publish(built)
    assert (entry.version, unchanged) == (1, True)
    for delay in (5, 6, 7):
        entry, unchanged = _publish(built, queue_delay_us=delay)
        assert not unchanged
    assert entry.version == 4
    assert all(_versions(repository, name) == ["3", "4"] for name in entry.models)
    assert "max_queue_delay_microseconds: 7" in (repository / "tiny-encoder" / "config.pbtxt").read_text()
    assert load_server_settings(repository).version == 4
    served = TokenizerModelSettings.load(repository / "tiny-tokenizer" / "4").served
    assert (served.version, served.model_digest) == (4, entry.model_digest)
    assert EncoderModelSettings.load(repository / "tiny-encoder" / "4").executor == "openvino"


def test_a_publication_that_was_cut_off_is_not_served_and_heals(built: Build) -> None:
    assert built.entry is not None
    repository = built.entry.repository
    shutil.copytree(repository / "tiny-tokenizer" / "1", repository / "tiny-tokenizer" / "2")
    with pytest.raises(BadEnvironment, match="a build was cut off: run `trireme build` again"):
        load_server_settings(repository)
    entry, _ = _publish(built, queue_delay_us=9)
    assert load_server_settings(repository).version == entry.version


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    with pytest.raises(BadEnvironment, match="run `trireme build`"):
        load_server_settings(tmp_path)


def test_rerankers_take_pairs(tmp_path: Path) -> None:
    from tests.conftest import save_tiny

    source = save_tiny(tmp_path / "checkpoint", "bert", "reranking", labels=1)
    built = pipeline.build(tiny_spec(source, "reranking"), "cpu", tmp_path / "build", "repository")
    assert built.entry is not None
    text = (built.entry.repository / "tiny" / "config.pbtxt").read_text()
    assert 'name: "text_pair"' in text
    assert 'name: "logits"' in text


def test_a_checkpoint_of_links_is_published_as_files(tiny_bert: Path, tmp_path: Path) -> None:
    """The Hugging Face cache holds relative links, which mean nothing elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.copytree(tiny_bert, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    built = pipeline.build(tiny_spec(snapshot), "cpu", tmp_path / "build", "repository")
    assert built.entry is not None
    published = built.entry.repository / "tiny-tokenizer" / "1" / "tokenizer.json"
    assert published.is_file()
    assert not published.is_symlink()
    assert not published.samefile(blobs / "tokenizer.json")


def test_a_failed_publication_leaves_what_was_served(built: Build) -> None:
    assert built.entry is not None
    repository = built.entry.repository
    before = sorted(path.relative_to(repository) for path in repository.rglob("*"))
    (built.served_graph.file_path).unlink()
    with pytest.raises(FileNotFoundError):
        _publish(built, queue_delay_us=5)
    assert sorted(path.relative_to(repository) for path in repository.rglob("*")) == before
    assert load_server_settings(repository).version == 1
