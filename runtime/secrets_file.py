"""The file of a control secret."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.errors import BadEnvironment


def read_secret(file: Path) -> str:
    """Visible ASCII on one line, because it travels as a header and stands in Triton's arguments. Raises BadEnvironment
    for one that can be guessed, or cannot be sent."""
    try:
        text = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise BadEnvironment(f"control secret {file} cannot be read: {error}") from error
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,256}", text):
        raise BadEnvironment(f"{file}: a control secret has 16 to 256 letters, digits, - or _")
    return text
