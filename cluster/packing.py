"""How objects of applied sets are written down: as text to compare by, packed to be kept, and by their names alone."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

from cluster.kinds import Object, metadata


def canonical(part: Any) -> str:
    """The same text for equal parts."""
    return json.dumps(part, sort_keys=True, default=str)


def pack(part: Any) -> str:
    return base64.b64encode(gzip.compress(json.dumps(part).encode(), mtime=0)).decode()


def unpack(text: str) -> Any:
    """Raises ValueError or OSError for what `pack` has not made."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def stub(item: Object) -> dict[str, Any]:
    about = {key: text for key, text in metadata(item).items() if key in ("name", "namespace")}
    return {"apiVersion": item["apiVersion"], "kind": item["kind"], "metadata": about}
