"""A spec file, read strictly: YAML, then types, then what must agree; each fault in the user's terms."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from builders.errors import SpecError
from builders.spec.compress import StepSlice
from builders.spec.deployment import DeploymentSpec
from builders.spec.slices import Slice

PRESETS = Path(__file__).parents[1] / "presets"


class _StrictLoader(yaml.SafeLoader):
    """YAML without the silent loss of a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise SpecError(
                    f"{self.name}, line {key.start_mark.line + 1}",
                    got=f"the key {key.value!r} twice",
                    expected="each key once",
                    fix="remove one of the two",
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def resolve_spec_path(argument: str) -> Path:
    """A path as given, or the name of a preset (`minilm`)."""
    path = Path(argument)
    preset = PRESETS / f"{argument}.yaml"
    if not path.is_file() and preset.is_file():
        return preset
    return path


def load_spec(argument: str | Path) -> DeploymentSpec:
    """Reads a spec file or a preset. Relative paths inside it are taken from the file's own folder.

    Raises SpecError: no such file, not YAML, not a mapping, unknown key, wrong type, impossible combination.
    """
    path = resolve_spec_path(str(argument))
    try:
        with path.open(encoding="utf-8") as stream:
            data = yaml.load(stream, Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise SpecError(
            f"spec {path}",
            got=_reason(error),
            expected="a readable YAML file",
            fix=f"check the path, or use: {presets}",
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise SpecError(
            f"spec {path}", got=" ".join(str(error).split()), expected="valid YAML", fix="mend the line named above"
        ) from error
    if not isinstance(data, dict):
        raise SpecError(
            f"spec {path}", got=type(data).__name__, expected="a mapping", fix="start from builders/presets/minilm.yaml"
        )
    try:
        spec = DeploymentSpec.model_validate(data)
    except ValidationError as error:
        raise _spec_error(path, error) from error
    return _anchor_paths(spec, path.resolve().parent)


def _anchor_paths(spec: DeploymentSpec, folder: Path) -> DeploymentSpec:
    texts = spec.precision.calibration_texts
    if texts is not None and not texts.is_absolute():
        spec = spec.model_copy(
            update={"precision": spec.precision.model_copy(update={"calibration_texts": folder / texts})}
        )
    if spec.online is not None and spec.online.old_texts is not None:
        online = spec.online.model_copy(update={"old_texts": folder / spec.online.old_texts})
        spec = spec.model_copy(update={"online": online})
    steps = tuple(_anchor_labels(step, folder) for step in spec.compress)
    spec = spec.model_copy(update={"compress": steps})
    source = folder / spec.model.source
    if spec.model.source.startswith(".") and source.is_dir():
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": str(source.resolve())})})
    return spec


def _anchor_labels(step: StepSlice, folder: Path) -> StepSlice:
    if step.labels is None:
        return step
    technique = getattr(step, step.name).model_copy(update={"labels": folder / step.labels})
    return step.model_copy(update={step.name: technique})


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _spec_error(path: Path, error: ValidationError) -> SpecError:
    """The first faults of a validation, in the user's terms: key path, value, what would be right."""
    by_key: dict[str, list[Any]] = {}  # a value that fits no type of several has a fault for each
    for fault in error.errors():
        by_key.setdefault(_key(fault), []).append(fault)
    (key, faults), *others = by_key.items()
    first = faults[0]
    more = f" (and {len(others)} more: {', '.join(other for other, _ in others[:4])})" if others else ""
    if first["type"] == "extra_forbidden":
        known = known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else "remove the key"
        expected = f"one of {', '.join(known)}" if known else "no key here yet"
        return SpecError(f"{path}: {key}", got="an unknown key" + more, expected=expected, fix=fix)
    if first["type"] == "missing":
        return SpecError(f"{path}: {key}", got="nothing" + more, expected="a value", fix=f"add {key}")
    if not first["loc"]:
        message = first["msg"].removeprefix("Value error, ")
        return SpecError(f"{path}", got=message, expected="a combination that can be served", fix="change one of these")
    prefixes = ("Value error, ", "Input should be ")
    said = dict.fromkeys(fault["msg"].removeprefix(prefixes[0]).removeprefix(prefixes[1]) for fault in faults)
    return SpecError(
        f"{path}: {key}", got=repr(first["input"]) + more, expected=" or ".join(said), fix=f"correct {key}"
    )


def _key(fault: Any) -> str:
    """Without the names that pydantic gives the types of which a value may be one."""
    kept: list[str] = []
    annotation: Any = DeploymentSpec
    for part in fault["loc"]:
        slice_type = _slice_in(annotation)
        if isinstance(part, int):
            kept.append(str(part))
        elif slice_type is not None and part in slice_type.model_fields:
            kept.append(part)
            annotation = slice_type.model_fields[part].annotation
        elif (fault["type"] == "extra_forbidden" and slice_type is not None) or _maps(annotation):
            kept.append(part)
    return ".".join(kept) or "the spec as a whole"


def known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the slice at `location`, looked up in the types themselves."""
    slice_type: Any = DeploymentSpec
    for part in location:
        if isinstance(part, int):
            continue
        annotation = slice_type.model_fields[part].annotation
        slice_type = _slice_in(annotation)
        if slice_type is None:
            return []
    return sorted(slice_type.model_fields)


def _maps(annotation: Any) -> bool:
    return any(get_origin(each) in (dict, Mapping) for each in _flatten(annotation))


def _slice_in(annotation: Any) -> type[Slice] | None:
    return next((t for t in _flatten(annotation) if isinstance(t, type) and issubclass(t, Slice)), None)


def _flatten(annotation: Any) -> list[Any]:
    return [annotation, *(inner for argument in get_args(annotation) for inner in _flatten(argument))]
