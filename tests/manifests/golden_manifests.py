"""The committed manifests of every preset: `python -m tests.manifests.golden_manifests` writes them again."""

from __future__ import annotations

import tempfile
from pathlib import Path

from builders.manifests.overlay import RENDERED, write_manifests
from builders.spec import PRESETS, Platform, load_spec

GOLDEN = Path(__file__).parent / "golden"
PLATFORMS: tuple[Platform, ...] = ("cpu", "gpu")
CASES = [(path.stem, platform) for path in sorted(PRESETS.glob("*.yaml")) for platform in PLATFORMS]
KEPT = ("kustomization.yaml", RENDERED)  # the rest is k8s/ itself, or shows in the rendering


def written(preset: str, platform: Platform, folder: Path) -> dict[str, str]:
    """Text of the kept files, by name."""
    write_manifests(load_spec(preset), platform, folder)
    return {name: (folder / name).read_text() for name in KEPT}


def golden(preset: str, platform: Platform) -> Path:
    return GOLDEN / f"{preset}-{platform}"


def main() -> None:
    for preset, platform in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in written(preset, platform, Path(folder) / "overlay").items():
                path = golden(preset, platform) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        print(golden(preset, platform).relative_to(GOLDEN.parents[2]))


if __name__ == "__main__":
    main()
