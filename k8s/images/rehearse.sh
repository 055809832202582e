#!/bin/sh
# rehearse.sh [FOLDER]: what serving.Dockerfile does, on a machine without Docker: the same install step into a fresh
# environment, then the entry point, which must start without `builders`. What this cannot show: the base images, the
# user, the read-only root.
set -eu

folder=${1:-$(mktemp -d)}
cd "$(dirname "$0")/../.."
k8s/images/install.sh serving "$folder/serving" embedded
cd "$folder"
serving/bin/python -m runtime.pod --help
serving/bin/python -m runtime.pod serve --help >/dev/null
serving/bin/python - <<'PYTHON'
import importlib.util

from runtime.gateway import process  # with all that it is made of
from runtime.server.launch import Installation

assert importlib.util.find_spec("builders") is None, "the serving image must not hold builders"
assert importlib.util.find_spec("pip") is None, "the serving image must not hold pip"
print(Installation.find().server, process.__name__)
PYTHON
