"""The offline checks: clean overlays pass, and each mistake of a long list is named."""

from __future__ import annotations

import contextlib
import json
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.__main__ import run
from builders.commands.manifests import lint_manifests
from builders.manifests.lint.check import check_text, check_texts, file_texts
from builders.manifests.lint.custom_resources import CUSTOM_RESOURCES
from builders.manifests.lint.objects import ManifestError, ObjectSet, matches, read_objects
from builders.manifests.lint.quantity import parse_quantity
from builders.manifests.lint.schemas import SUPPORTED, schema_findings
from builders.manifests.render import render
from tests import ROOT
from tests.conftest import needs_kubectl
from tests.manifests.kube_edits import EDITS as EDITS_OF_RULES
from tests.manifests.kube_edits import Edit, edited
from tests.manifests.value_edits import VALUE_EDITS

pytestmark = needs_kubectl

K8S = ROOT / "k8s"
EDITS = [*EDITS_OF_RULES, *VALUE_EDITS]
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())


@cache
def rendered(overlay: str) -> str:
    return render(K8S / "overlays" / overlay)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_clean(overlay: str) -> None:
    assert check_text(rendered(overlay), overlay) == []


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_each_mistake_is_named(edit: Edit) -> None:
    findings = check_text(edited(rendered(edit.overlay), edit), edit.overlay)
    assert edit.rule in {finding.rule for finding in findings}, findings
    assert all(finding.got and finding.expected and finding.fix for finding in findings)


def test_mistakes_are_many_and_cover_the_rules() -> None:
    assert len(EDITS) >= 40
    assert len({edit.name for edit in EDITS}) == len(EDITS)


def test_a_clean_file_and_a_fault_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(rendered("cpu-dev"))
    bad.write_text(rendered("cpu-dev").replace("targetPort: grpc", "targetPort: web"))
    run(lambda: lint_manifests([good], as_json=True))
    assert json.loads(capsys.readouterr().out)["findings"] == []
    with pytest.raises(SystemExit) as stopped:
        run(lambda: lint_manifests([bad], as_json=True))
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {item["rule"] for item in found} == {"port"}
    assert all(set(item) == {"severity", "rule", "object", "path", "got", "expected", "fix"} for item in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "valid YAML"),
        ("just words", "without apiVersion and kind"),
        ("name: x", "without apiVersion and kind"),
        ("apiVersion: v1\nkind: {{ .Values.kind }}", "valid YAML"),
        ("\x00", "valid YAML"),
    ],
)
def test_what_is_no_manifest_is_the_users_input(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ManifestError, match=said):
        check_texts(file_texts(file))
    with pytest.raises(SystemExit) as stopped:
        run(lambda: lint_manifests([file]))
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["gone.yaml", "."])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match=str(tmp_path)):
        check_texts(file_texts(tmp_path / name))


def test_files_are_one_set(tmp_path: Path) -> None:
    """A reference may lead from one file to another, and a list is as good as a stream."""
    parts = rendered("single-gpu").split("\n---\n")
    for index, part in enumerate(parts):
        (tmp_path / f"{index:02}.yaml").write_text(part)
    checked = check_texts(file_texts(tmp_path))
    assert (len(checked.objects), checked.findings) == (len(parts), ())
    (tmp_path / "00.yaml").write_text('{"apiVersion": "v1", "kind": "List", "items": []}')
    assert len(check_texts(file_texts(tmp_path)).objects) == len(parts) - 1


def test_a_key_that_is_given_twice_is_named() -> None:
    text = "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: a\n  name: b\n"
    (finding,) = [item for item in check_text(text, "x.yaml") if item.rule == "duplicate-key"]
    assert "line 5" in finding.path
    assert "'name'" in finding.got


def test_dates_and_equals_signs_stay_text() -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {when: 2026-01-01, sign: =}\n"
    (item,), _ = read_objects(text, "x.yaml")
    assert item.data["data"] == {"when": "2026-01-01", "sign": "="}


def test_the_same_fault_is_named_once_for_all_versions() -> None:
    (item,), _ = read_objects("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {portz: []}\n", "x")
    assert len(SUPPORTED) == 2
    assert len(schema_findings(item)) == 1


@pytest.mark.parametrize(("api_version", "kind"), CUSTOM_RESOURCES, ids=lambda text: text.rpartition("/")[2])
def test_custom_resources_refuse_unknown_fields(api_version: str, kind: str) -> None:
    text = f"apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: a}}\nspec: {{surprise: 1}}\n"
    (item,), _ = read_objects(text, "x.yaml")
    assert any("surprise" in finding.got for finding in schema_findings(item))


def test_the_pods_own_words_are_followed() -> None:
    """Grace is measured with the values of the ConfigMap that the arguments name."""
    text = rendered("single-gpu").replace('DRAIN_S: "30"', 'DRAIN_S: "90"')
    assert {finding.rule for finding in check_text(text, "x")} == {"grace"}


@pytest.mark.parametrize(
    ("selector", "labels", "said"),
    [
        ({}, {"a": "b"}, True),
        ({"matchLabels": {"a": "b"}}, {"a": "b", "c": "d"}, True),
        ({"matchLabels": {"a": "x"}}, {"a": "b"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}, {"a": "b"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["b"]}]}, {"a": "b"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {}, True),
    ],
)
def test_label_selectors(selector: dict[str, object], labels: dict[str, str], said: bool) -> None:
    assert matches(selector, labels) is said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", "0.5"),
        ("16Gi", str(16 * 2**30)),
        ("1.5G", "1500000000"),
        ("2e3", "2000"),
        (4, "4"),
        (".5", "0.5"),
        ("1E", "1e18"),
    ],
)
def test_quantities(text: object, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


@pytest.mark.parametrize("text", ["16GiB", "", "1 Gi", "Gi", "1e", "0x10", None, True, "1.2.3", "\uff11Gi"])
def test_what_is_no_quantity(text: object) -> None:
    assert parse_quantity(text) is None


@given(st.integers(0, 10**9), st.sampled_from(["Ki", "Mi", "Gi", "k", "M", "G", "m"]))
def test_a_quantity_is_its_number_times_its_unit(number: int, unit: str) -> None:
    one = parse_quantity(f"1{unit}")
    assert one is not None
    assert parse_quantity(f"{number}{unit}") == number * one


_KEYS = st.sampled_from(["spec", "name", "containers", "ports", "x"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("abc-1", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(OVERLAYS), st.data())
def test_no_shape_of_input_is_a_crash(overlay: str, data: st.DataObject) -> None:
    """Anything may stand anywhere in a manifest: the answer is findings, or that it is no manifest."""
    documents = json.loads(_as_json(overlay))
    place: Any = data.draw(st.sampled_from(documents))
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.integers(0, 5)) == 0:
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    with contextlib.suppress(ManifestError):
        check_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}), "x.json")


@cache
def _as_json(overlay: str) -> str:
    return json.dumps(list(yaml.load_all(rendered(overlay), yaml.CSafeLoader)))


def test_an_empty_set_has_no_findings() -> None:
    assert list(ObjectSet(()).pods()) == []
    assert check_text("", "empty.yaml") == []
