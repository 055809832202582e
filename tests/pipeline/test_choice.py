"""`precision.cpu` carried out: measured by what serves, recorded for a later reader, and never saturated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from builders import pipeline
from builders.artifacts import PrecisionChoice
from builders.pipeline import CHOICE_FILE, Build
from builders.spec import DeploymentSpec, load_spec
from builders.store.processor import this_processor
from runtime.settings import EncoderModelSettings, GeneratorModelSettings
from tests.conftest import tiny_spec
from tests.generators import save_generator

# OpenVINO and oneDNN each read one; together they make any CPU one with AVX2 alone, saturating products included.
BUDGET = 0.996
AVX2_ONLY = {"OV_CPU_MAX_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture(scope="module")
def chosen(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    spec = tiny_spec(tiny_bert, precision={"cpu": "auto", "calibration_samples": 16, "min_worst_cosine": 0.97})
    return pipeline.build(spec, "cpu", tmp_path_factory.mktemp("auto"), "repository")


def test_auto_takes_one_of_what_this_cpu_computes(chosen: Build) -> None:
    choice = chosen.choice
    assert choice is not None
    assert (choice.asked, choice.processor) == ("auto", this_processor())
    assert {item.precision for item in choice.candidates} == {"fp32", "bf16", "int8"}
    for item in choice.candidates:
        assert item.reason
        assert (item.speed is None) == item.reason.startswith(("not tried", "refused"))
    measured = {item.precision: item for item in choice.candidates if item.speed is not None}
    assert measured["fp32"].speed == 1
    assert measured[choice.chosen].quality is not None


def test_everything_downstream_sees_what_was_taken(chosen: Build) -> None:
    choice, entry = chosen.choice, chosen.entry
    assert choice is not None
    assert entry is not None
    assert chosen.spec.precision.cpu == entry.precision == choice.chosen
    version = entry.repository / "tiny-encoder" / "1"
    assert EncoderModelSettings.load(version).bfloat16 == (choice.chosen != "fp32")
    tokenizer = json.loads((entry.repository / "tiny-tokenizer" / "1" / "settings.json").read_text())
    assert tokenizer["served"]["precision"] == choice.chosen
    beside = json.loads((version / CHOICE_FILE).read_text())
    assert beside == choice.model_dump(mode="json")
    assert beside["processor"]["name"]


def test_a_choice_is_not_measured_again(chosen: Build) -> None:
    assert chosen.entry is not None
    said = []
    spec = chosen.spec.model_copy(update={"precision": chosen.spec.precision.model_copy(update={"cpu": "auto"})})
    root = chosen.entry.repository.parents[2]
    again = pipeline.build(spec, "cpu", root, "repository", lambda stage, message: said.append(f"{stage} {message}"))
    assert (again.choice, again.entry) == (chosen.choice, chosen.entry)
    assert len(list((root / "store" / "precision").iterdir())) == 1
    assert not [line for line in said if "in speed" in line]


def test_ranks_compute_in_fp32_and_the_record_says_why(tiny_bert: Path, tmp_path: Path) -> None:
    spec = tiny_spec(tiny_bert, precision={"cpu": "auto"}, parallel={"tensor": 2}, engine={"targets": ["sm89"]})
    built = pipeline.build(spec, "cpu", tmp_path, "precision")
    assert built.spec.precision.cpu == "fp32"
    assert built.choice is not None
    assert [item.precision for item in built.choice.candidates if item.reason.startswith("not tried")] == [
        "dynamic_int8",
        "int8",
        "bf16",
    ]


@pytest.mark.parametrize(("kind", "task"), [("llama", "generation"), ("t5", "seq2seq")])
def test_language_models_are_timed_by_what_serves_them(kind: str, task: str, tmp_path: Path) -> None:
    model = {"source": str(save_generator(tmp_path / "model", kind)), "task": task, "max_length": 64}
    precision = {"max_perplexity_ratio": 2.0, "calibration_samples": 32}
    spec = DeploymentSpec.model_validate({"name": "lm", "model": model, "precision": precision})
    assert spec.precision.cpu == "auto"
    built = pipeline.build(spec, "cpu", tmp_path / "build", "repository" if kind == "llama" else "precision")
    assert built.choice is not None
    speeds = {item.precision: item.speed for item in built.choice.candidates}
    assert list(speeds) == ["w8", "w4", "fp32"]
    assert all(speed is not None and speed > 0 for speed in speeds.values())
    assert built.choice.executor == ("openvino" if kind == "llama" else "onnxruntime")
    if built.entry is not None:
        version = built.entry.repository / "lm" / "1"
        assert GeneratorModelSettings.load(version).served.precision == built.choice.chosen
        assert (version / CHOICE_FILE).is_file()


def test_a_name_is_taken_and_weighed(tiny_bert: Path, tmp_path: Path) -> None:
    built = pipeline.build(tiny_spec(tiny_bert, precision={"cpu": "bf16"}), "cpu", tmp_path, "qualify")
    choice = built.choice
    assert choice is not None
    assert (choice.asked, choice.chosen) == ("bf16", "bf16")
    named, plain = choice.candidates
    assert named.speed is not None
    assert plain.precision == "fp32"
    if not this_processor().has_bfloat16:
        assert "has no bf16" in str(choice.warning)


def _build(spec: Path, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builders", "build", spec, "--build-dir", root, "--json", "--until", "qualify"],
        env={**os.environ, **AVX2_ONLY}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def _wide(folder: Path, **precision: object) -> Path:
    """So wide that every product can be quantised, which spares the search; narrower than saturation."""
    data = load_spec("minilm").model_dump(mode="json")
    data["precision"] |= {"calibration_samples": 32, "min_mean_cosine": BUDGET, "min_worst_cosine": 0.95, **precision}
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(data))
    return spec


def test_saturated_int8_is_never_served(minilm: Build, tmp_path: Path) -> None:
    """As on a CPU with AVX2 alone. The graph is right (ONNX Runtime says so) and OpenVINO's products of it are not: on
    a CPU that claims to have VNNI, the measurement finds it; on one without, it is not tried."""
    assert minilm.entry is not None
    root = minilm.entry.repository.parents[2]  # its exports are there already
    done = _build(_wide(tmp_path), root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["precision"]
    choice = PrecisionChoice.model_validate({**found, "directory": tmp_path})
    assert choice.chosen == "fp32"
    assert not choice.processor.has_bfloat16
    int8 = next(item for item in choice.candidates if item.precision == "int8")
    assert int8.reason.startswith(
        "refused: int8 service of" if choice.processor.multiplies_bytes else "not tried: this CPU has no VNNI"
    ), int8


@pytest.mark.slow
def test_saturated_int8_is_refused_by_name(minilm: Build, tmp_path: Path) -> None:
    assert minilm.entry is not None
    spec = _wide(tmp_path, cpu="int8")
    done = _build(spec, minilm.entry.repository.parents[2])
    assert done.returncode == 1, done.stderr
    assert "int8 service of packaged:all-MiniLM-L6-v2 misses the quality budget" in done.stderr
    assert f"(budget {BUDGET})" in done.stderr
