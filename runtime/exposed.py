"""Which addresses only this machine reaches, and what listening on others takes."""

from __future__ import annotations

from runtime.errors import BadEnvironment

_ONLY_HERE = ("127.0.0.1", "localhost", "::1")


def require_keys(address: str, has_keys: bool, no_auth: bool) -> None:
    """Raises BadEnvironment for a door that stands open to a network unawares."""
    if address not in _ONLY_HERE and not has_keys and not no_auth:
        raise BadEnvironment(
            f"the gateway on {address} would answer anybody; give --api-keys-file, or say --no-auth where that is meant"
        )
