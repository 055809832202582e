"""The committed `config.pbtxt` of every preset: `python -m tests.repository.golden_configs` writes them again.

model_repository/<preset>/cpu/               the Python backend with OpenVINO, or with rank processes
model_repository/<preset>/gpu-tensorrt/      Triton's tensorrt backend
model_repository/<preset>/gpu-tensorrt-rtx/  the Python backend with TensorRT for RTX; it does not run ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builders import pipeline
from builders.artifacts import PipelineStage
from builders.checkpoint import load_checkpoint
from builders.partition.cut.shard import plan_graph
from builders.repository.encoder_config import EncoderInterface, model_configs
from builders.spec import PRESETS, DeploymentSpec, Flavour, Platform, load_spec
from runtime.model_config import to_pbtxt
from tests import ROOT

MODEL_REPOSITORY = ROOT / "model_repository"
BUILD = ROOT / "build"


def expected(build_dir: Path) -> dict[Path, str]:
    """Text by path, for every preset, platform and flavour. Pipeline stages need the graph: it is built if absent."""
    files = {}
    for preset in sorted(path.stem for path in PRESETS.glob("*.yaml")):
        spec = load_spec(preset)
        interface = EncoderInterface.of(load_checkpoint(spec.model))
        stages = _stages(spec, build_dir)
        wanted: list[tuple[str, Platform, Flavour]] = [("cpu", "cpu", spec.engine.flavour)]
        wanted += [("gpu-tensorrt", "gpu", "tensorrt")]
        wanted += [("gpu-tensorrt-rtx", "gpu", "tensorrt-rtx")] if spec.parallel.ranks == 1 else []
        for folder, platform, flavour in wanted:
            flavoured = spec.model_copy(update={"engine": spec.engine.model_copy(update={"flavour": flavour})})
            for name, config in model_configs(flavoured, platform, interface, stages).items():
                files[MODEL_REPOSITORY / preset / folder / name / "config.pbtxt"] = to_pbtxt(config)
    return files


def _stages(spec: DeploymentSpec, build_dir: Path) -> Sequence[PipelineStage]:
    """What passes between the stages of the fp16 graph that the GPU's engines are built from."""
    if spec.parallel.pipeline == 1:
        return ()
    built = pipeline.build(_for_gpu(spec), "cpu", build_dir, "export")
    planned = plan_graph(built.graph("fp16").file_path, spec.parallel.tensor, spec.parallel.pipeline)
    return tuple(stage.record for stage in planned)


def _for_gpu(spec: DeploymentSpec) -> DeploymentSpec:
    """The same exports without a TensorRT on this machine: int8 on CPU starts from fp16 as well."""
    return spec.model_copy(update={"precision": spec.precision.model_copy(update={"cpu": "int8"})})


def main() -> None:
    for path, text in expected(BUILD).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
