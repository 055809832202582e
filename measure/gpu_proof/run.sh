#!/usr/bin/env bash
# Verifies what lies beside this file, unpacks it into FOLDER and runs the proof there, without a network:
#     bash run.sh FOLDER [arguments of the proof, such as --out RESULTS or --dry]
# Wheels that were left behind are not asked for: the machine's own packages have to do.
set -euo pipefail
[ $# -ge 1 ] || { echo "error: no folder named; expected: bash run.sh FOLDER [arguments of the proof]" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$1"
target=$(cd "$1" && pwd)
shift
(cd "$here" && sha256sum --check --quiet --ignore-missing SHA256SUMS)
mkdir -p "$target/source" "$target/site"
tar --extract --gzip --file "$here/sources.tar.gz" --directory "$target/source"
shopt -s nullglob
wheels=("$here"/wheels/*.whl)
[ ${#wheels[@]} -eq 0 ] || python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$target/site" "${wheels[@]}"
PYTHONPATH="$target/source:$target/site${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m measure.gpu_proof "$@"
