"""What the spec says about the cluster. The arithmetic that follows is in `manifests.sizing`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from builders.spec.slices import Name, NotNegative, Positive, Slice

Tag = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class ImageSlice(Slice):
    """Where images come from. `trireme/serving`, `-gpu` variants and the builder share one tag."""

    registry: str = Field("", description="put before every image name, such as registry.example.com/team")
    tag: Tag = Field("0.1.0", description="of all images; `latest` is refused")
    serving_digest: Digest | None = Field(
        None, description="`sha256:…`: the serving image by its content, instead of the tag"
    )
    pull_secret: Name | None = Field(None, description="Secret with the registry's login")

    @model_validator(mode="after")
    def _pinned(self) -> ImageSlice:
        if self.tag == "latest":
            raise ValueError("images.tag=latest names no version; give the release that is to run")
        return self


class ModelStoreSlice(Slice):
    """Where built models lie. The engine-build Job writes, pods read.

    `claim`: a PersistentVolumeClaim. `gcs` and `s3`: a bucket, mounted by the cloud's CSI driver under the identity of
    the pods' service account.
    """

    kind: Literal["claim", "gcs", "s3"] = Field(
        "claim", description="a PersistentVolumeClaim, or a bucket of Google Cloud Storage or of S3"
    )
    size_gib: Positive = Field(50, description="asked of the storage class; a bucket grows as it must")
    access: Literal["ReadWriteMany", "ReadOnlyMany", "ReadWriteOnce"] = Field(
        "ReadWriteMany", description="claim only; ReadWriteOnce holds all pods on one node"
    )
    storage_class: str | None = Field(None, description="claim only; default: the cluster's default class")
    bucket: str | None = Field(None, description="name of the bucket; required for gcs and s3")
    identity: str | None = Field(None, description="Google service account (gcs) or IAM role ARN (s3) of the pods")
    cache_gib: NotNegative = Field(
        0, description="room for the weights of two versions, copied to the node's disk first; 0: read from the store"
    )

    @model_validator(mode="after")
    def _whole(self) -> ModelStoreSlice:
        if (self.kind != "claim") != (self.bucket is not None):
            raise ValueError(f"model_store.kind={self.kind} {'needs' if self.kind != 'claim' else 'takes no'} bucket")
        if self.kind == "claim" and self.identity is not None:
            raise ValueError("model_store.identity is for gcs and s3")
        return self


class ScalingSlice(Slice):
    """How the number of pods follows the load. `hpa` needs prometheus-adapter, `keda` needs KEDA; never both."""

    by: Literal["none", "hpa", "keda"] = Field("hpa", description="none: as many pods as min_replicas, always")
    min_replicas: Positive = Field(2, description="also the number of pods where scaling.by is none")
    max_replicas: Positive = Field(8, description="most pods")
    queue_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="share of slo.p95_latency_ms that a request may wait before pods are added"
    )
    scale_down_s: Positive = Field(600, description="how long the load must have been low before a pod goes")
    prometheus: str = Field(
        "http://prometheus-operated.monitoring.svc:9090", description="keda only: where Prometheus answers"
    )

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSlice:
        if self.by != "none" and self.min_replicas > self.max_replicas:
            raise ValueError(f"scaling.min_replicas={self.min_replicas} is over max_replicas={self.max_replicas}")
        return self


class GatewaySlice(Slice):
    """The way in from outside, through Gateway API, to the pods' own gateway."""

    class_name: str = Field(description="GatewayClass of the cluster's implementation")
    hostname: str = Field(description="name under which clients of gRPC ask")
    http_hostname: str | None = Field(
        None, description="another name, under which clients of HTTP ask (OpenAI's API, KServe's); default: gRPC alone"
    )
    tls_secret: Name = Field("serving-tls", description="Secret with the certificate of these names")

    @model_validator(mode="after")
    def _apart(self) -> GatewaySlice:
        if self.http_hostname == self.hostname:
            raise ValueError(
                f"gateway.http_hostname={self.hostname} is hostname too: Gateway API takes one kind of route a name; "
                "give them two names"
            )
        return self


class AccessSlice(Slice):
    """Who may ask the pods. Their gateway is all that the Service shows."""

    api_keys_secret: Name | None = Field(
        None,
        description="Secret whose key `keys` holds `name:sha256` a line, and `monitor` the key that Prometheus sends; "
        "default: `<name>-api-keys`, which `trireme deploy` makes, with the clients' key as `client`",
    )
    no_auth: bool = Field(False, description="whoever reaches the Service is answered; nobody is asked for a key")
    tls_secret: Name | None = Field(
        None, description="Secret of type kubernetes.io/tls: both ports of the pods speak TLS; default: plain"
    )
    vllm_metrics: bool = Field(False, description="a generator's figures under vLLM's names as well")
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[A-Za-z0-9.-]+(:[1-9][0-9]{0,4})?(/[A-Za-z0-9._/-]*)?$",
        description="a span for each request goes to this collector, by OTLP over HTTP; pods may connect to its port; "
        "the serving image is built with `EXTRAS` that name `otlp`; default: none",
    )

    @model_validator(mode="after")
    def _one_way(self) -> AccessSlice:
        if self.no_auth and self.api_keys_secret is not None:
            raise ValueError("access.no_auth asks nobody for the keys of access.api_keys_secret; leave one of them out")
        return self


class TolerationSlice(Slice):
    """A taint that pods put up with. Without `value`, any value of the key."""

    key: str = Field(description="key of the taint")
    value: str | None = Field(None, description="its value; default: any")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="its effect; default: every effect"
    )


class KubernetesSlice(Slice):
    """Deployment to a cluster."""

    namespace: Name | None = Field(
        None, description="where everything goes; default: the spec's name, so that each model has its own"
    )
    create_namespace: bool | None = Field(
        None,
        description="whether the Namespace is part of the manifests, with Pod Security restricted; default: only where "
        "`namespace` is left out. `trireme deploy` never changes one that is there",
    )
    images: ImageSlice = ImageSlice()
    model_store: ModelStoreSlice = ModelStoreSlice()
    scaling: ScalingSlice = ScalingSlice()
    gateway: GatewaySlice | None = Field(
        None, description="a way in from outside; default: reachable inside the cluster only"
    )
    access: AccessSlice = AccessSlice()
    build_in_cluster: bool = Field(True, description="a Job builds the model on the kind of node that will serve it")
    huggingface_token: Name | None = Field(
        None, description="Secret whose key `token` the engine-build Job downloads with; for gated and private models"
    )
    monitoring: bool = Field(True, description="PodMonitor, alerts and a dashboard; needs the Prometheus operator")
    monitoring_labels: dict[str, str] = Field(
        {},
        description="labels of PodMonitor and PrometheusRule, where Prometheus selects by them: kube-prometheus-stack "
        "wants `release: <its release>`",
    )

    gpu_resource: str = Field("nvidia.com/gpu", description="device plugin's name; a MIG slice has one of its own")
    gpus_by: Literal["device-plugin", "dra"] = Field(
        "device-plugin", description="how a pod gets its GPUs; dra: a ResourceClaimTemplate"
    )
    gpus_per_node: Positive = Field(
        8,
        description="ranks that one node takes, each with a GPU where there are any; a language model with more gets "
        "several nodes, with whole pipeline stages on each, and needs LeaderWorkerSet",
    )
    node_selector: dict[str, str] = Field({}, description="labels of the nodes; GPU nodes are found by engine.targets")
    gpu_node_labels: dict[str, dict[str, str]] = Field(
        {},
        description="target (`sm89`) -> labels of the nodes with such a GPU, such as "
        "`cloud.google.com/gke-accelerator: nvidia-l4`; default: those of NVIDIA's GPU feature discovery",
    )
    tolerations: tuple[TolerationSlice, ...] = Field(
        (), description="taints that pods and build Jobs tolerate, besides `nvidia.com/gpu` on GPUs"
    )
    priority_class: str | None = Field(None, description="PriorityClass of the pods")

    cpus: Positive | None = Field(None, description="CPUs of a pod; default: 4, or 8 for each GPU")
    memory_gib: Positive | None = Field(
        None, description="memory of a pod without /dev/shm; default: 4, or 16 for each GPU"
    )
    shm_mib: Positive | None = Field(
        None, description="/dev/shm of a pod; default: 256, or 2048 for each GPU where there are several"
    )

    load_s: Positive = Field(
        300, description="longest time from the fetched model to its first answer; the startup probe waits as long"
    )
    fetch_s: Positive = Field(3600, description="how long a pod waits for its model to be built")
    pre_stop_s: Positive = Field(10, description="pause before SIGTERM, in which endpoints are withdrawn")
    drain_s: Positive = Field(30, description="what is in flight gets this long after SIGTERM")
    surge: bool = Field(
        True, description="false: an old pod leaves before a new one comes, for pools without spare GPUs"
    )
    graph_digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64}|any)$")] = Field(
        "any", description="digest of the graph that engines must come from, as `trireme build --json` gives it"
    )

    @model_validator(mode="after")
    def _tls_ends_once(self) -> KubernetesSlice:
        if self.gateway is not None and self.access.tls_secret is not None:
            raise ValueError(
                "kubernetes.gateway ends TLS and asks the pods in the clear, which access.tls_secret forbids; leave "
                "one of them out"
            )
        return self
