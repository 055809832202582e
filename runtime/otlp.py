"""Where spans go by OpenTelemetry's protocol, and what that takes to be installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from urllib.parse import urlsplit

from runtime.errors import BadEnvironment

TRACES = "/v1/traces"  # of a collector whose base alone was named, as OpenTelemetry has it
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


def traces_url(endpoint: str, needed: Sequence[str] = _NEEDED) -> str:
    """The whole URL. Raises BadEnvironment for what is none, or where the exporter is not installed."""
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = None
    if not sound or parts.query or parts.fragment:
        raise BadEnvironment(
            f"--otlp-endpoint {endpoint[:80]!r} is no address of a collector; give http://host:4318, or the whole URL"
        )
    if "@" in parts.netloc:
        raise BadEnvironment(
            "--otlp-endpoint holds a password, which every user of this machine can read; "
            "give it as a header in OTEL_EXPORTER_OTLP_HEADERS"
        )
    missing = next((name for name in needed if not _installed(name)), None)
    if missing is not None:
        raise BadEnvironment(
            f"--otlp-endpoint: {missing} is not installed; pip install 'trireme[otlp]' "
            "(an image: --build-arg EXTRAS=embedded,otlp)"
        )
    return endpoint if parts.path not in ("", "/") else endpoint.rstrip("/") + TRACES


def _installed(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
