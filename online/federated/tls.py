"""Both sides show a certificate of an authority that the other knows. The name in a client's is the client."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online.federated.wire import OPTIONS
from runtime.errors import InputError, Unavailable
from runtime.gateway.tls import Certificate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HANDSHAKE_S = 10.0


@dataclass(frozen=True)
class TlsIdentity:
    """In PEM: a certificate with what leads to its root, its key without a password, and the authority of the other
    side."""

    chain: Path
    key: Path
    authority: Path

    def parts(self) -> tuple[bytes, bytes, bytes]:
        """Key, chain, authority. Raises BadEnvironment for files that do not belong together, InputError for an
        authority that is none."""
        Certificate(self.chain, self.key)  # raises
        try:
            ssl.create_default_context(cafile=self.authority)
        except OSError as error:  # SSLError is one
            raise InputError(
                f"--tls-ca {self.authority}",
                got=str(error),
                expected="the other side's authority, in PEM",
                fix="give the certificate that signed those of the other side",
            ) from error
        return self.key.read_bytes(), self.chain.read_bytes(), self.authority.read_bytes()

    def of_server(self) -> Any:
        import grpc

        key, chain, authority = self.parts()
        return grpc.ssl_server_credentials([(key, chain)], authority, require_client_auth=True)

    def channel(self, address: str) -> Any:
        import grpc

        key, chain, authority = self.parts()
        credentials = grpc.ssl_channel_credentials(authority, key, chain)
        return grpc.secure_channel(address, credentials, options=[*OPTIONS, ("grpc.enable_http_proxy", 0)])

    def require_trust(self, host: str, port: int) -> None:
        """A handshake by itself, as gRPC calls a refused certificate a server that is away. Raises InputError where one
        side does not accept the other's, Unavailable where nobody answers."""
        context = ssl.create_default_context(cafile=self.authority)
        context.load_cert_chain(self.chain, self.key)
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection((host, port), _HANDSHAKE_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as secure,
            ):
                if not secure.recv(1):  # the server speaks first, once it has accepted ours
                    raise ssl.SSLError("it closed the connection after our certificate")
        except ssl.SSLError as error:
            raise InputError(
                f"certificates of {host}:{port} and {self.chain}",
                got=str(error),
                expected="each signed by the authority that the other side was given, the coordinator's for its host",
                fix="check --tls-cert and --tls-ca here, and --tls-ca at the coordinator",
            ) from error
        except OSError as error:
            raise Unavailable(f"the coordinator at {host}:{port} does not answer: {error}") from error


def name_in(context: Any) -> str | None:
    """The common name in the certificate of a call's client, where it is one that can stand in a file's name."""
    found = context.auth_context().get("x509_common_name", [])
    name = found[0].decode("utf-8", "replace") if len(found) == 1 else ""
    return name if _NAME.fullmatch(name) else None
