"""API keys: a file of hashes. What a client sends is hashed and compared with every one, in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from runtime.errors import BadEnvironment

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-fA-F]{64})")
_LONGEST = 512


class Keys:
    """Names by the hash of their key."""

    def __init__(self, hashes: dict[bytes, str]) -> None:
        self._hashes = hashes

    @staticmethod
    def load(file: Path) -> Keys:
        """`name:sha256` a line, the hash in hexadecimal; empty lines and those that begin with # do not count.

        Raises BadEnvironment that names the line at fault.
        """
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise BadEnvironment(f"--api-keys-file {file} cannot be read: {error}") from error
        found: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            match = _LINE.fullmatch(text)
            if match is None or bytes.fromhex(match[2]) in found or match[1] in found.values():
                raise BadEnvironment(
                    f"--api-keys-file {file}, line {number}: expected name:sha256, each name and each key once; "
                    "make the hash with: printf %s KEY | sha256sum"
                )
            found[bytes.fromhex(match[2])] = match[1]
        if not found:
            raise BadEnvironment(f"--api-keys-file {file} holds no key; write a line name:sha256")
        return Keys(found)

    def name(self, authorization: bytes) -> str | None:
        """Whose key this `Authorization: Bearer …` is; None: nobody's."""
        scheme, _, key = authorization.strip().partition(b" ")  # gRPC clients leave the blank that stands before it
        if scheme.lower() != b"bearer" or not 0 < len(key) <= _LONGEST:
            return None
        given = hashlib.sha256(key.strip()).digest()
        found = None
        for known, name in self._hashes.items():  # all of them, also after a match
            if hmac.compare_digest(known, given):
                found = name
        return found
