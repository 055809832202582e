"""YAML for kustomize: a text is quoted where kustomize or the API server would read another value in it."""

from __future__ import annotations

import yaml

from builders.manifests.lint.objects import PLAIN_WORDS


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what it would itself misread; `y`, `1e3` and `0o17` are texts to it, and not to Go."""


for _tag, _pattern, _first in PLAIN_WORDS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def written(content: object) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)
