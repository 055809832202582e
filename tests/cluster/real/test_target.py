"""`make test-cluster` touches no cluster that nobody named."""

from __future__ import annotations

import os
import subprocess

from tests import ROOT


def test_without_a_kubeconfig_it_says_so_and_ends_with_2() -> None:
    environment = {key: text for key, text in os.environ.items() if key != "KUBECONFIG"}
    done = subprocess.run(
        ["make", "test-cluster"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "KUBECONFIG: got nothing" in done.stderr
    assert "Fix: make test-cluster KUBECONFIG=" in done.stderr
