"""The committed `config.pbtxt` of every preset: `python -m tests.golden_configs` writes them again.

model_repository/<preset>/cpu/               the Python backend with OpenVINO
model_repository/<preset>/gpu-tensorrt/      Triton's tensorrt backend
model_repository/<preset>/gpu-tensorrt-rtx/  the Python backend with TensorRT for RTX
"""

from __future__ import annotations

from pathlib import Path

from builders.checkpoint import load_checkpoint
from builders.repository.config import Interface, model_configs, to_pbtxt
from builders.spec import PRESETS, load_spec

ROOT = Path(__file__).parents[1] / "model_repository"


def expected() -> dict[Path, str]:
    """Text by path, for every preset, platform and flavour."""
    files = {}
    for preset in sorted(path.stem for path in PRESETS.glob("*.yaml")):
        spec = load_spec(preset)
        interface = Interface.of(load_checkpoint(spec.model))
        for flavour in ("tensorrt", "tensorrt-rtx"):
            flavoured = spec.model_copy(update={"engine": spec.engine.model_copy(update={"flavour": flavour})})
            for name, config in model_configs(flavoured, "gpu", interface).items():
                files[ROOT / preset / f"gpu-{flavour}" / name / "config.pbtxt"] = to_pbtxt(config)
        for name, config in model_configs(spec, "cpu", interface).items():
            files[ROOT / preset / "cpu" / name / "config.pbtxt"] = to_pbtxt(config)
    return files


def main() -> None:
    for path, text in expected().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT.parent))


if __name__ == "__main__":
    main()
