"""The certificate of both doors, read again when it was renewed."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from runtime.errors import BadEnvironment


class Certificate:
    """In PEM: the certificate with what leads to its root, and its key. Connections that stand keep what they have."""

    def __init__(self, chain: Path, key: Path) -> None:
        """Raises BadEnvironment for files that do not belong together."""
        self._chain, self._key = chain, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and 1.3
        self.context.set_alpn_protocols(["http/1.1"])
        self._pair: tuple[bytes, bytes] = (b"", b"")
        self.read()

    def read(self) -> None:
        """Raises BadEnvironment, and the certificate stays what it was."""
        try:
            trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            trial.load_cert_chain(self._chain, self._key, password=_no_password)
            pair = self._key.read_bytes(), self._chain.read_bytes()
            self.context.load_cert_chain(self._chain, self._key, password=_no_password)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise BadEnvironment(
                f"--tls-cert {self._chain} and --tls-key {self._key} cannot be used ({error}); "
                "give a certificate and its own key, both in PEM and the key without a password"
            ) from error
        self._pair = pair

    def grpc_credentials(self) -> Any:
        """gRPC asks at each handshake."""
        import grpc

        told = self._pair

        def fetch() -> Any:
            nonlocal told
            if told is self._pair:
                return None
            told = self._pair
            return grpc.ssl_server_certificate_configuration([told])

        return grpc.dynamic_ssl_server_credentials(grpc.ssl_server_certificate_configuration([told]), fetch)


def _no_password() -> str:
    """Else OpenSSL would ask for one, on a terminal."""
    raise ValueError("the key has a password")
