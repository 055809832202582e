"""docs/spec.md, written from the descriptions in `builders.spec`: each key, what it takes, what it means."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from builders.spec import PRESETS, DeploymentSpec, Slice
from builders.spec.deployment import UNREAD
from measure.house import ROOT

PAGE = ROOT / "docs" / "spec.md"
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
_BOUNDS = {"gt": "over", "ge": "at least", "lt": "under", "le": "at most"}
_HEAD = """# The spec

<!-- Written by `make docs` from the descriptions in builders/spec. Change them there. -->

A spec is one YAML file that says everything about one deployment. Every command takes its path, or the name of a
preset: `minilm`, `minilm-small`, `minilm-tp2` or `minilm-pp2`, which lie in `builders/presets/`.

- Only `name`, `model.source` and `model.task` are required.
- An unknown key is refused, with the nearest known one. So is a key that the task does not read, and a combination that
  cannot be served.
- A relative `calibration_texts`, `labels` or `old_texts` counts from the spec's folder.
- Here "encoders" are the tasks embedding, classification and reranking; "language models" are generation and seq2seq.

This is the preset `minilm`, whole:

```yaml
{preset}```

In the tables, an empty default means that the key may be left out, and its meaning says what happens then. A column
`for` names who reads a key, where not every task does.
"""


def render() -> str:
    """The whole page."""
    head = _HEAD.format(preset=(PRESETS / "minilm.yaml").read_text())
    return "\n".join([head, *(_section(kind, paths) for kind, paths in slices().items())])


def slices() -> dict[type[Slice], list[str]]:
    """Every slice with the key paths where it stands, in the order of the spec; the whole spec has an empty path."""
    found: dict[type[Slice], list[str]] = {}
    for path, kind in _below("", DeploymentSpec):
        found.setdefault(kind, []).append(path)
    return found


def described(field: FieldInfo) -> str:
    """What the key means: its own description, or that of the slice that it holds. Empty where nobody has said it."""
    return field.description or next((_summary(inner) for inner in _slices_in(field.annotation)), "")


def _below(path: str, found: type[Slice]) -> Iterator[tuple[str, type[Slice]]]:
    yield path, found
    for key, field in found.model_fields.items():
        for inner in _slices_in(field.annotation):
            yield from _below(f"{path}.{key}" if path else key, inner)


def _slices_in(annotation: Any) -> list[type[Slice]]:
    if isinstance(annotation, type) and issubclass(annotation, Slice):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _slices_in(argument)]


def _section(kind: type[Slice], paths: list[str]) -> str:
    """Heading, docstring, and a row for each key; a column for the tasks where not every key is read by all."""
    title = ", ".join(f"`{path}`" for path in paths) if paths != [""] else "The whole"
    rows = {key: _readers(paths[0], key) for key in kind.model_fields}
    mixed = len(set(rows.values())) > 1
    only = next((f" For {tasks} alone." for tasks in set(rows.values()) if tasks and not mixed), "")
    lines = [f"## {title}", "", " ".join((kind.__doc__ or "").split()) + only]
    if rows:
        columns = ["key", "takes", "default", *(["for"] if mixed else []), "meaning"]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [_row(key, kind.model_fields[key], [tasks or "all"] if mixed else []) for key, tasks in rows.items()]
    return "\n".join(lines) + "\n"


def _row(key: str, field: FieldInfo, tasks: list[str]) -> str:
    cells = (f"`{key}`", _takes(field), _default(field), *tasks, described(field))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _takes(field: FieldInfo) -> str:
    for inner in _slices_in(field.annotation):
        link = f"[keys](#{'-'.join(path.replace('.', '') for path in slices()[inner])})"
        return f"list of {link}" if get_origin(field.annotation) is tuple else link
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: list[Any]) -> str:
    """A type in words: choices as they are written, numbers with their bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _words(arguments[0], [one for each in annotation.__metadata__ for one in _constraints(each)] + metadata)
    if origin in (Union, types.UnionType):
        return ", ".join(_words(each, metadata) for each in arguments if each is not type(None))
    if origin is tuple:
        return f"list: {_words(arguments[0], [])}"
    if origin is dict:
        return "mapping of text to text"
    bounds = [f"{_BOUNDS[name]} {getattr(one, name)}" for one in metadata for name in _BOUNDS if hasattr(one, name)]
    return ", ".join([_NAMES[annotation], *bounds])


def _constraints(found: Any) -> list[Any]:
    return found.metadata if isinstance(found, FieldInfo) else [found]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if field.default is None or _slices_in(field.annotation) or field.default in ("", {}):
        return ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(str(each) for each in field.default)}]`"
    return f"`{field.default}`"


def _readers(path: str, key: str) -> str:
    """Who reads a key that not every task reads; empty where all do."""
    unread = {kind for kind, known in UNREAD.items() if path in known and (key in known[path] or not known[path])}
    if "encoder" in unread:
        return "language models"
    if "embedding" in unread:
        return "classification, reranking"
    return "encoders" if "generator" in unread else ""


def _summary(found: type[Slice]) -> str:
    """The first sentence of a slice's docstring, without its full stop."""
    return " ".join((found.__doc__ or "").split()).partition(". ")[0].removesuffix(".")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
