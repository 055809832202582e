"""Commands about the cluster's files: manifests written and checked, models put into the store that pods read."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, PlatformOption, SpecArgument, fail, status
from builders.errors import InputError, SpecError

if TYPE_CHECKING:
    from builders.manifests.lint.objects import KubeObject
    from builders.spec import EngineSlice


def manifests(
    spec: SpecArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write, new or written before")],
    platform: PlatformOption = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """A kustomize overlay from a spec, and its rendered YAML, checked offline."""
    from builders.manifests.overlay import RENDERED, write_manifests
    from builders.spec import load_spec

    with status(f"write {output}", as_json):
        written = write_manifests(load_spec(spec), platform, output)
    if as_json:
        print(written.model_dump_json(indent=2))
        return
    gpus = f", {written.gpus_per_pod} GPU a pod" if written.gpus_per_pod else ""
    print(f"{output}: {written.objects} objects in namespace {written.namespace}{gpus}")
    print(f"  rendered {output / RENDERED}\n  apply    kubectl apply --server-side -k {output}")


def lint_manifests(
    files: Annotated[
        list[Path], typer.Argument(help="YAML files, folders of them or of kustomize, `-`; all together one set")
    ],
    ignore: Annotated[list[str] | None, typer.Option(help="rule to leave out; may be given several times")] = None,
    crd: Annotated[
        list[Path] | None, typer.Option(help="file or folder of CustomResourceDefinitions to check against")
    ] = None,
    from_cluster: Annotated[
        bool, typer.Option("--cluster", help="check against the CustomResourceDefinitions of the current cluster")
    ] = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="print SARIF 2.1.0, for code scanning")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Checks anyone's manifests offline: strict schemas, then what schemas let pass. Exit 1 with findings.

    A comment `# lint-manifests: ignore RULE` in a document leaves the rule out for its objects.
    """
    from builders.manifests.lint.check import check_texts, file_texts
    from builders.manifests.lint.definitions import definitions
    from builders.manifests.lint.objects import read_objects
    from builders.manifests.lint.sarif import sarif
    from builders.manifests.lint.schemas import SUPPORTED

    skipped = _known_rules(ignore or [])
    texts = [found for path in files for found in _manifest_texts(path)]
    given = [item for path in crd or [] for source, text in file_texts(path) for item in read_objects(text, source)[0]]
    given += _cluster_definitions() if from_cluster else []
    checked = check_texts(texts, given=definitions(given))
    count, findings = len(checked.objects), [item for item in checked.findings if item.rule not in skipped]
    if as_sarif:
        print(json.dumps(sarif(findings, checked.places), indent=2))
    elif as_json:
        rows = [{"severity": finding.severity, **dataclasses.asdict(finding)} for finding in findings]
        print(json.dumps({"objects": count, "kubernetes": list(SUPPORTED), "findings": rows}, indent=2))
    else:
        for finding in findings:
            print(finding)
    if findings:
        fail(f"{len(findings)} findings in {count} objects", 1)
    if not as_json and not as_sarif:
        print(f"{count} objects: nothing found (Kubernetes {' and '.join(SUPPORTED)})")


def _cluster_definitions() -> list[KubeObject]:
    """Raises ClusterError where there is no cluster, or these credentials may not list them."""
    from builders.manifests.lint.objects import KubeObject
    from cluster.api import Cluster
    from cluster.kinds import DEFINITIONS

    with Cluster.connect() as cluster:
        return [KubeObject(item) for item in cluster.list_objects(DEFINITIONS, "").items]


def _known_rules(chosen: list[str]) -> set[str]:
    from builders.manifests.lint.severities import SEVERITIES

    for rule in chosen:
        if rule not in SEVERITIES:
            expected = f"a rule: {', '.join(sorted(SEVERITIES))}"
            raise InputError("--ignore", got=rule, expected=expected, fix="take the name as a finding says it")
    return set(chosen)


def _manifest_texts(path: Path) -> list[tuple[str, str]]:
    """Sources and their text. What kustomize reads is rendered: its files are no objects by themselves."""
    from builders.manifests.lint.check import file_texts
    from builders.manifests.render import KUSTOMIZATIONS, render

    if str(path) == "-":
        return [("standard input", sys.stdin.read())]
    if path.is_dir() and any((path / name).is_file() for name in KUSTOMIZATIONS):
        return [(str(path), render(path))]
    return file_texts(path)


def publish(
    spec: SpecArgument,
    store: Annotated[Path, typer.Option(help="model store, as pods mount it")],
    platform: PlatformOption = "cpu",
    target: Annotated[str | None, typer.Option(help="build this one of engine.targets only, such as sm89")] = None,
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Builds what is missing and publishes it to a model store, under the key that serving pods look for."""
    from builders import pipeline
    from builders.commands import show
    from builders.commands.championed import load_championed
    from runtime.pod.model_store import publish as publish_repository

    found = load_championed(spec, build_dir)
    if target is not None:
        found = found.model_copy(update={"engine": _only(found.engine, target)})
    with show.build_progress(quiet=as_json) as report:
        built = pipeline.build(found, platform, build_dir, "repository", report)
    assert built.entry is not None
    published, unchanged = publish_repository(built.entry.repository, platform, store)
    if as_json:
        print(published.model_dump_json(indent=2))
    else:
        print(f"version {published.version}{', as before' if unchanged else ''}: {published.folder(store)}")
        if not unchanged and published.version > 1:
            print(f"  running pods take it with: trireme load-version {spec} --version {published.version}")


def _only(engine: EngineSlice, target: str) -> EngineSlice:
    if target not in engine.targets:
        expected = f"one of engine.targets: {', '.join(engine.targets)}"
        raise SpecError("--target", got=target, expected=expected, fix="choose one of these, or add it to the spec")
    return engine.model_copy(update={"targets": (target,)})
