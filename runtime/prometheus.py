"""A page of Prometheus text: fetched and read."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

TIMEOUT_S = 5.0
MAX_BYTES = 8 << 20


def fetch(url: str, timeout_s: float = TIMEOUT_S) -> str:
    """Text of a metrics page. Raises OSError or HTTPException."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us and loopback
    with opener.open(url, timeout=timeout_s) as response:
        return str(response.read(MAX_BYTES).decode("utf-8", errors="replace"))


def metric_lines(page: str, prefix: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name without `prefix`, labels and value of each metric in Prometheus text whose name begins so."""
    for line in page.splitlines():
        match = re.fullmatch(rf"{prefix}(\w*)\{{(.*)\}}\s+([-+.\deE]+)(\s+\d+)?", line.strip())
        if match is not None:
            pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2])
            labels = {key: re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text) for key, text in pairs}
            yield match[1], labels, float(match[3])


def model_labels(page: str) -> Iterator[dict[str, str]]:
    """Labels of each `trireme_model_info` in Prometheus text: what is served."""
    for _, labels, value in metric_lines(page, "trireme_model_info"):
        if value == 1:
            yield labels
