"""Schemathesis: cases made from `/openapi.json`, right ones and wrong ones, sent to both services."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from measure.clients.asking import Asks, ServedPair, require

CLIENT = "schemathesis"
# Without `positive_data_acceptance`: what goes together, and what a model takes, is more than a schema says.
_CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method", "ignored_auth",
)  # fmt: skip
_SECONDS = 60  # of one service's cases
_EXAMPLES = 5  # of each operation


def asks(served: ServedPair) -> Asks:
    def cases(url: str) -> None:
        program = Path(sys.executable).parent / "schemathesis"
        command = [
            str(program), "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {served.key}",
            "--checks", ",".join(_CHECKS), "--phases", "fuzzing", "-n", str(_EXAMPLES), "--no-shrink",
            "--seed", "1", "--workers", "1", "--request-timeout", "60", "--no-color", "--generation-database", "none",
            "--continue-on-failure", "--suppress-health-check", "all",
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS * 3, check=False)
        sys.stderr.write(ran.stdout[-20000:] if ran.returncode else "")
        tested = re.search(r"(\d+) generated", ran.stdout)
        require(ran.returncode == 0, f"exit {ran.returncode}: {ran.stdout.strip().splitlines()[-1:]}")
        require(tested and int(tested[1]) > 100, ran.stdout[-300:])

    return {
        "cases of /openapi.json: text": lambda: cases(served.text),
        "cases of /openapi.json: vectors": lambda: cases(served.vectors),
    }
