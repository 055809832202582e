"""One cluster: how to reach it, and requests to its API server.

The official client does authentication, TLS and proxies. Requests are plain REST on top of it: its dynamic client would
keep a discovery cache in a file of a predictable name under /tmp, and its typed models know no custom resources.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.errors import ClusterError
from cluster.kinds import PODS, Object, Resource, root_path
from cluster.refusal import Operation, read_status, refused
from runtime.errors import MachineError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

CONNECT_S, READ_S = 5.0, 30.0
_RETRIES = 1  # of a connection that was not made; the default of 3 makes an absent server slow to report
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# What the library raises for a kubeconfig that is YAML, but no kubeconfig.
_MALFORMED = (TypeError, KeyError, AttributeError, ValueError, yaml.YAMLError)
_WARNING = re.compile(r'\d{3} \S+ "((?:[^"\\]|\\.)*)"')  # RFC 7234, section 5.5: code, agent, quoted text
_CONTENT_TYPES = {"PATCH": "application/apply-patch+yaml"}  # JSON is YAML

Query = Mapping[str, str | int | bool]


@dataclass(frozen=True)
class Listing:
    """`version` is where a watch goes on from."""

    items: tuple[Object, ...]
    version: str


def _tell(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


class Cluster:
    """Not for several threads at once; `namespace` is for objects that name none.

    `warn` hears once of each warning that the server gives with its answers, by default on standard error.
    """

    def __init__(self, api: ApiClient, namespace: str, warn: Callable[[str], None] = _tell) -> None:
        self.api, self.namespace, self.warn = api, namespace, warn
        self._warned: set[str] = set()
        self._discovered: dict[str, dict[str, Resource]] = {}

    @staticmethod
    def connect(kubeconfig: Path | None = None, context: str | None = None, namespace: str | None = None) -> Cluster:
        """By the given file, else KUBECONFIG or ~/.kube/config, else as a pod of the cluster. Asks for nothing yet.

        Raises ClusterError when none of them is there or usable, MachineError without the client's package.
        """
        try:
            from kubernetes import config
            from kubernetes.client import ApiClient, Configuration
        except ImportError as error:
            raise MachineError(
                "package kubernetes",
                got="not installed",
                expected="kubernetes>=37",
                fix="pip install 'trireme[kubernetes]'",
            ) from error
        settings = Configuration()
        settings.retries = _RETRIES
        try:
            if kubeconfig is not None or _has_kubeconfig():
                source = str(kubeconfig) if kubeconfig else None
                config.load_kube_config(source, context, client_configuration=settings, persist_config=False)
                default = _context_namespace(source, context)
            else:
                config.load_incluster_config(client_configuration=settings)
                default = _POD_NAMESPACE.read_text().strip() if _POD_NAMESPACE.exists() else "default"
        except (config.ConfigException, OSError, *_MALFORMED) as error:
            raise ClusterError(
                "connection to a cluster",
                got=f"{kubeconfig or 'no kubeconfig'} ({error})",
                expected="a kubeconfig with a current context, or a pod's service account",
                fix="set KUBECONFIG or give --kubeconfig and --context; `kind create cluster` makes a local cluster",
            ) from error
        return Cluster(ApiClient(settings), namespace or default)

    @property
    def host(self) -> str:
        return str(self.api.configuration.host)

    def close(self) -> None:
        self.api.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def resource(self, api_version: str, kind: str) -> Resource | None:
        """Where this kind lives, or None when the cluster does not know it. Asked once for each group version."""
        if api_version not in self._discovered:
            probe = Operation("get", Resource("v1", "APIResourceList", root_path(api_version)[1:], False))
            try:
                found = self._json("GET", root_path(api_version), probe)
            except ClusterError as error:
                if error.code != 404:
                    raise
                found = {}
            self._discovered[api_version] = {
                item["kind"]: Resource(api_version, item["kind"], item["name"], bool(item["namespaced"]))
                for item in found.get("resources") or ()
                if "/" not in item["name"]
            }
        return self._discovered[api_version].get(kind)

    def forget_kinds(self) -> None:
        """After custom resource definitions were applied, what was discovered is stale."""
        self._discovered.clear()

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """None when there is no such object."""
        try:
            return self._json("GET", resource.path(namespace, name), Operation("get", resource, namespace, name))
        except ClusterError as error:
            if error.code == 404:
                return None
            raise

    def list_objects(self, resource: Resource, namespace: str, query: Query | None = None) -> Listing:
        """Every object of one namespace; `query` takes labelSelector and fieldSelector."""
        found = self._json("GET", resource.path(namespace), Operation("list", resource, namespace), query)
        items = tuple({**item, "kind": resource.kind} for item in found.get("items") or ())
        return Listing(items, str(found["metadata"]["resourceVersion"]))

    def send(
        self, method: str, path: str, action: Operation, query: Query | None = None, body: Object | None = None
    ) -> Object:
        """POST, PUT, DELETE, and PATCH, which is a server-side apply. Returns the object as it is now."""
        return self._json(method, path, action, query, body)

    def log(self, namespace: str, pod: str, query: Query) -> str:
        """Log text of a container of a pod."""
        action = Operation("get", PODS, namespace, pod, "log")
        return self._bytes("GET", PODS.path(namespace, pod, "log"), action, query, None).decode(errors="replace")

    def stream(self, resource: Resource, namespace: str, query: Query, read_s: float) -> Iterator[Object]:
        """Events of a watch, until the server ends it. A connection that breaks ends it too."""
        import urllib3

        action = Operation("watch", resource, namespace)
        response = self._call("GET", resource.path(namespace), action, {**query, "watch": True}, None, read_s)
        try:
            pending = b""
            for part in response.response.stream(amt=None, decode_content=False):
                *lines, pending = (pending + part).split(b"\n")
                yield from (json.loads(line) for line in lines if line.strip())
        except urllib3.exceptions.HTTPError:
            return  # the caller lists again and goes on
        finally:
            response.response.close()

    def _json(
        self, method: str, path: str, action: Operation, query: Query | None = None, body: Object | None = None
    ) -> dict[str, Any]:
        answer = self._bytes(method, path, action, query, body)
        found = read_status(answer)
        if "kind" not in found:
            raise ClusterError(
                f"answer of {self.host}{path}",
                got=found.get("message", found),
                expected="an object of the Kubernetes API",
                fix="check that the kubeconfig names an API server, not a web page or proxy",
            )
        return dict(found)

    def _bytes(self, method: str, path: str, action: Operation, query: Query | None, body: Object | None) -> bytes:
        import urllib3

        response = self._call(method, path, action, query, body, READ_S)
        try:
            return bytes(response.read())
        except urllib3.exceptions.HTTPError as error:
            raise _unreachable(self.host, error) from error

    def _call(
        self, method: str, path: str, action: Operation, query: Query | None, body: Object | None, read_s: float
    ) -> Any:
        """One request. Raises ClusterError for no answer, and for one that is no success."""
        import urllib3
        from kubernetes.client import ApiException

        pairs = [(key, str(item).lower() if isinstance(item, bool) else item) for key, item in (query or {}).items()]
        headers = {"Accept": "application/json, */*", "Content-Type": _CONTENT_TYPES.get(method, "application/json")}
        try:
            prepared = self.api.param_serialize(
                method, path, query_params=pairs, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            response = self.api.call_api(*prepared, _request_timeout=(CONNECT_S, read_s))
            self._pass_on(response.response.headers.getlist("Warning"))
            if not 200 <= response.status <= 299:
                raise refused(action, response.status, read_status(bytes(response.read())))
        except (urllib3.exceptions.HTTPError, ApiException) as error:
            raise _unreachable(self.host, error) from error
        return response

    def _pass_on(self, headers: list[str]) -> None:
        for text in (found for header in headers for found in _WARNING.findall(header)):
            if text not in self._warned:
                self._warned.add(text)
                self.warn(re.sub(r"\\(.)", r"\1", text))


def _unreachable(host: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"API server {host}",
        got=str(getattr(error, "reason", None) or error),
        expected="an answer",
        fix="check that the cluster runs, that the kubeconfig's context names it, and VPN, proxy and certificates",
    )


def _has_kubeconfig() -> bool:
    from kubernetes.config import KUBE_CONFIG_DEFAULT_LOCATION

    return any(Path(part).expanduser().is_file() for part in KUBE_CONFIG_DEFAULT_LOCATION.split(":") if part)


def _context_namespace(source: str | None, context: str | None) -> str:
    from kubernetes.config import list_kube_config_contexts

    contexts, active = list_kube_config_contexts(source)
    chosen = next((item for item in contexts if item["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")
