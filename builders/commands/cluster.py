"""Commands about a cluster: deploy what a spec says, watch it, take it back, reach it, load a new model version."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from builders.commands.options import JsonFlag, PlatformOption, status
from builders.errors import InputError
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from cluster.api import Cluster
    from cluster.deploy import Deployed
    from cluster.kinds import ObjectName
    from cluster.revision import Revision
    from cluster.rollout import RolloutProgress

Target = Annotated[str, typer.Argument(help="spec file or preset; or manifests: a YAML file, a kustomize folder")]
Kubeconfig = Annotated[Path | None, typer.Option(help="default: KUBECONFIG, then ~/.kube/config, then the pod's own")]
Context = Annotated[str | None, typer.Option(help="context of the kubeconfig; default: its current one")]
NameOption = Annotated[str | None, typer.Option(help="name of the applied set; default: the spec's name")]
Force = Annotated[bool, typer.Option(help="take over fields that others have set")]
Timeout = Annotated[float | None, typer.Option(min=1, help="seconds; default: what the objects' deadlines allow")]
_COMPONENT = "app.kubernetes.io/component"


@dataclass(frozen=True)
class AppliedSet:
    """What the user names: objects, the namespace that they are for, and the name that they are recorded under."""

    name: str
    namespace: str | None
    documents: tuple[Mapping[str, Any], ...]


def deploy(
    target: Target,
    platform: PlatformOption = "cpu",
    dry_run: Annotated[
        Literal["none", "server"], typer.Option(help="server: judged by the cluster, not done")
    ] = "none",
    undo_on_failure: Annotated[bool, typer.Option(help="bring the last set that was ready back")] = False,
    force_conflicts: Force = False,
    timeout_s: Timeout = None,
    name: NameOption = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: JsonFlag = False,
) -> None:
    """Server-side apply of the whole set, then waits until it serves. Exit 1 with the pods' own reasons."""
    from cluster import deploy
    from cluster.rollout import Patience

    found = _read(target, platform, name)
    with _connect(found, kubeconfig, context) as cluster:
        if dry_run == "server":
            with status("dry run", as_json):
                planned = deploy.plan(cluster, found.documents, force_conflicts)
            rows = [{"object": str(item.name), "change": item.change} for item in planned]
            print(json.dumps(rows, indent=2) if as_json else "\n".join(f"{r['change']:<9} {r['object']}" for r in rows))
            return
        patience = Patience(timeout_s=timeout_s or deploy.time_limit_s(found.documents))
        with rollout_display(quiet=as_json) as report:
            done = deploy.deploy(
                cluster, found.name, found.documents, patience, report,
                force=force_conflicts, undo_on_failure=undo_on_failure,
            )  # fmt: skip
    _print_deployed(found.name, done, as_json)


def diff(
    target: Target,
    platform: PlatformOption = "cpu",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """What `deploy` would change, as the cluster sees it."""
    from cluster.apply import dry_run
    from cluster.diff import changes_text

    found = _read(target, platform, "any")
    with _connect(found, kubeconfig, context) as cluster, status("dry run", False):
        text = changes_text(dry_run(cluster, found.documents, show_conflicts=True))
    print(text or "nothing would change", end="" if text else "\n")


def cluster_status(
    target: Target,
    name: NameOption = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: JsonFlag = False,
) -> None:
    """Each workload in one line with its problems, and the sets that were applied."""
    from cluster.deploy import workloads
    from cluster.revision import read_history
    from cluster.rollout import looks_at

    found = _place(target, name)
    with _connect(found, kubeconfig, context) as cluster:
        history = read_history(cluster, found.name)
        documents = history.current.documents if history.current else found.documents
        settled = history.current is not None and history.current.outcome == "ready"
        looks = looks_at(cluster, workloads(cluster, documents), settled)
    if as_json:
        revisions = [_without_documents(item) for item in history.revisions]
        print(json.dumps({"workloads": [_progress_json(look) for look in looks], "revisions": revisions}, indent=2))
        return
    for look in looks:
        print(f"{look.name}: {look.state}, {look.text}")
        for problem in look.problems:
            print(f"  {problem}")
    for item in history.revisions:
        restored = f", restores revision {item.restores}" if item.restores else ""
        print(f"revision {item.number}, {item.applied_at}: {item.outcome}{restored}")


def undo(
    target: Target,
    force_conflicts: Force = False,
    timeout_s: Timeout = None,
    name: NameOption = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: JsonFlag = False,
) -> None:
    """Brings back the last set before the current one that became ready."""
    from cluster import deploy
    from cluster.revision import read_history
    from cluster.rollout import Patience

    found = _place(target, name)
    with _connect(found, kubeconfig, context) as cluster:
        current = read_history(cluster, found.name).current
        patience = Patience(timeout_s=timeout_s or deploy.time_limit_s(current.documents if current else ()))
        with rollout_display(quiet=as_json) as report:
            done = deploy.undo(cluster, found.name, patience, report, force=force_conflicts)
    _print_deployed(found.name, done, as_json)


def port_forward(
    target: Target,
    port: Annotated[int, typer.Option(min=1, max=65535, help="the pods' port; 8080: HTTP, 8081: gRPC")] = 8080,
    local_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 0,
    name: NameOption = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """A port of this machine that leads to a ready pod, until Ctrl-C. Each connection asks anew which pod is ready."""
    import sys

    from cluster.kinds import name_of
    from cluster.observe import is_ready, observe
    from cluster.port_forward import PortForward
    from runtime.server.stopping import stop_requests

    found = _place(target, name)
    with _connect(found, kubeconfig, context) as cluster:
        workload = _serving_workload(cluster, found)

        def choose() -> str:
            ready = [name_of(pod) for pod in observe(cluster, workload).pods if is_ready(pod)]
            if not ready:
                raise ClusterError(
                    str(workload),
                    got="no ready pod",
                    expected="at least one",
                    fix="see `trireme status` for the reasons",
                )
            return ready[0]

        def report(message: str) -> None:
            print(message, file=sys.stderr)

        namespace = workload.namespace or cluster.namespace
        with (
            stop_requests() as asked_to_stop,
            PortForward(cluster, namespace, choose, port, local_port, report) as forward,
        ):
            print(f"{forward.address} -> port {port} of {workload}; Ctrl-C ends it", flush=True)
            asked_to_stop.wait()


def load_version(
    target: Target,
    version: Annotated[int, typer.Option(min=1, help="as `trireme publish` or the engine-build Job numbered it")],
    control_secret: Annotated[
        str | None,
        typer.Option(
            help="NAME/KEY of the Secret that opens the pods' repository control; default: the one they mount"
        ),
    ] = None,
    name: NameOption = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    as_json: JsonFlag = False,
) -> None:
    """Loads a published version into running pods, one at a time; new pods then start with it. Stops at the first
    pod that fails. An older version is loaded the same way."""
    from cluster.control import CONTROL_KEY, CONTROL_SECRET, mounted_control
    from cluster.control import control_secret as read_secret
    from cluster.load_version import load_version as load
    from cluster.observe import observe

    secret, separator, key = (control_secret or f"/{CONTROL_KEY}").partition("/")
    if not separator:
        raise InputError("--control-secret", got=control_secret, expected="NAME/KEY", fix="name the key in the Secret")
    found = _place(target, name)
    with _connect(found, kubeconfig, context) as cluster:
        workload = _serving_workload(cluster, found)
        secret = secret or mounted_control(observe(cluster, workload).workload or {}) or CONTROL_SECRET
        control = read_secret(cluster, secret, key)
        pods = load(cluster, workload, version, control, report=_say(as_json))
    print(json.dumps({"version": version, "pods": pods}) if as_json else f"version {version} in {len(pods)} pods")


def _read(target: str, platform: Literal["cpu", "gpu"], name: str | None) -> AppliedSet:
    """The objects of a spec, a YAML file or a kustomize folder."""
    from builders.manifests.render import render

    path = Path(target)
    if path.is_dir():
        return _from_text(render(path), str(path), name)
    if path.is_file() and _is_manifest(path):
        return _from_text(path.read_text(encoding="utf-8"), str(path), name)
    from builders.manifests.overlay import RENDERED, write_manifests
    from builders.manifests.patches import namespace_of
    from builders.spec import load_spec

    spec = load_spec(target)
    with tempfile.TemporaryDirectory(prefix="trireme-deploy-") as folder:
        written = write_manifests(spec, platform, Path(folder) / "overlay")
        rendered = _from_text((written.directory / RENDERED).read_text(encoding="utf-8"), target, spec.name)
    return dataclasses.replace(rendered, name=name or spec.name, namespace=namespace_of(spec))


def _place(target: str, name: str | None) -> AppliedSet:
    """Name and namespace only: what was applied is known from its record, and a spec need not be rendered again."""
    path = Path(target)
    if path.is_dir() or (path.is_file() and _is_manifest(path)):
        return _read(target, "cpu", name)
    from builders.manifests.patches import namespace_of
    from builders.spec import load_spec

    spec = load_spec(target)
    return AppliedSet(name or spec.name, namespace_of(spec), ())


def _is_manifest(path: Path) -> bool:
    import yaml

    try:
        first = next(yaml.safe_load_all(path.read_text(encoding="utf-8")), None)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # the reader of specs says what is wrong
    return isinstance(first, dict) and "apiVersion" in first and "kind" in first


def _from_text(text: str, source: str, name: str | None) -> AppliedSet:
    """Raises InputError for faults of the YAML, and for a set that neither --name nor its labels name."""
    from builders.manifests.lint.objects import read_objects

    objects, findings = read_objects(text, source)
    if findings:
        first = findings[0]
        raise InputError(f"{source} {first.path}", got=first.got, expected=first.expected, fix=first.fix)
    names = {item.labels.get("app.kubernetes.io/instance") for item in objects} - {None}
    namespaces = {item.namespace for item in objects} - {""}
    chosen = name or (names.pop() if len(names) == 1 else None)
    if chosen is None:
        raise InputError(
            source, got="no one label app.kubernetes.io/instance", expected="a name for the set", fix="give --name"
        )
    one = namespaces.pop() if len(namespaces) == 1 else None
    return AppliedSet(chosen, one, tuple(item.data for item in objects))


@contextmanager
def _connect(found: AppliedSet, kubeconfig: Path | None, context: str | None) -> Iterator[Cluster]:
    from cluster.api import Cluster

    with Cluster.connect(kubeconfig, context, found.namespace) as cluster:
        yield cluster


def _serving_workload(cluster: Cluster, found: AppliedSet) -> ObjectName:
    """The one Deployment or LeaderWorkerSet that serves: by its label, or because there is no other."""
    from cluster.apply import names
    from cluster.revision import read_history

    current = read_history(cluster, found.name).current
    documents = current.documents if current else found.documents
    able = [item for item in documents if item["kind"] in ("Deployment", "LeaderWorkerSet")]
    labelled = [item for item in able if (item["metadata"].get("labels") or {}).get(_COMPONENT) == "serving"]
    serving = names(cluster, labelled or able)
    if len(serving) != 1:
        raise ClusterError(
            f"applied set {found.name} in namespace {cluster.namespace}",
            got=", ".join(map(str, serving)) or "nothing that serves",
            expected=f"one Deployment or LeaderWorkerSet, or one labelled {_COMPONENT}=serving",
            fix="run `trireme deploy` first, or name the right spec",
        )
    return serving[0]


@contextmanager
def rollout_display(quiet: bool) -> Iterator[Callable[[Sequence[RolloutProgress]], None]]:
    """A bar for each workload with what it waits for; a line for each change where standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=quiet)
    said: dict[str, str] = {}
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(
        *columns, TextColumn("{task.fields[detail]}"), console=console, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, Any] = {}

        def show(found: Sequence[RolloutProgress]) -> None:
            for item in found:
                name = str(item.name)
                detail = f"{item.text}; {item.problems[0]}" if item.problems else item.text
                if not console.is_terminal and said.get(name) != detail:
                    console.print(f"{name}: {detail}", highlight=False, markup=False, soft_wrap=True)
                said[name] = detail
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=None, detail="")
                bars.update(tasks[name], total=item.wanted or None, completed=item.ready, detail=detail)

        yield show


def _say(quiet: bool) -> Callable[[str], None]:
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    return lambda message: console.print(message, highlight=False, markup=False)


def _print_deployed(name: str, done: Deployed, as_json: bool) -> None:
    if as_json:
        rows = [{"object": str(item.name), "change": item.change} for item in done.applied]
        record = {
            "revision": _without_documents(done.revision),
            "objects": rows,
            "workloads": [_progress_json(item) for item in done.progress],
            "deleted": [str(item) for item in done.deleted],
            "left": [str(item) for item in done.left],
        }
        print(json.dumps(record, indent=2))
        return
    changed = [item for item in done.applied if item.change not in ("unchanged", "kept")]
    print(f"{name}: revision {done.revision.number} is ready, {len(changed)} of {len(done.applied)} objects changed")
    for look in done.progress:
        print(f"  {look.name}: {look.text}")
    for item in done.deleted:
        print(f"  deleted {item}, which this set no longer has")
    for item in done.left:
        print(f"  left {item}, which this set no longer has: it holds data; delete it by hand")


def _without_documents(revision: Revision) -> dict[str, Any]:
    return {key: text for key, text in vars(revision).items() if key != "documents"}


def _progress_json(look: RolloutProgress) -> dict[str, Any]:
    about = {"workload": str(look.name), "state": look.state, "ready": look.ready, "wanted": look.wanted}
    return {**about, "text": look.text, "problems": [str(problem) for problem in look.problems]}
