"""Fixed words, ranges and formats of single fields, as the API server checks them beyond its schemas.

A path is dotted; `[]` stands for every item of a list. Three levels: a container (every one), a pod's spec (every
one), and an object of a kind. Source: kubernetes.io/docs/reference/kubernetes-api, each field's own page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from builders.manifests.lint import formats
from builders.manifests.lint.objects import PROBES

Words = tuple[str, ...]
Range = tuple[int, int | None]  # the least and the greatest, None for no end
Format = tuple[Callable[[Any], bool], str]  # whether a value is right, and what is expected

_PROTOCOLS: Words = ("TCP", "UDP", "SCTP")
_ACCESS: Words = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
_SECCOMP: Words = ("RuntimeDefault", "Unconfined", "Localhost")
_FAIL: Words = ("Fail", "Ignore")
_RBAC = "rbac.authorization.k8s.io"
_ID: Range = (0, 2**31 - 1)
_PORT: Range = (1, 65535)
_NAME: Format = (formats.is_dns_name, "a name as DNS takes it")
_NAME_OR_NONE: Format = (lambda text: text == "" or formats.is_dns_name(text), _NAME[1])
_LABEL: Format = (formats.is_dns_label, "lower-case letters, digits and `-`, at most 63")
_LABEL_OR_NONE: Format = (lambda text: text == "" or formats.is_dns_label(text), _LABEL[1])
_SOMETHING: Format = (lambda text: text != "", "a text that is not empty")
_SHARE: Format = (formats.is_share, "a number or a percentage")

CONTAINER_WORDS: dict[str, Words] = {
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
    "ports[].protocol": _PROTOCOLS,
    "securityContext.seccompProfile.type": _SECCOMP,
    "securityContext.procMount": ("Default", "Unmasked"),
    "volumeMounts[].mountPropagation": ("None", "HostToContainer", "Bidirectional"),
    "volumeMounts[].recursiveReadOnly": ("Disabled", "IfPossible", "Enabled"),
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "restartPolicyRules[].action": ("Restart", "RestartAllContainers"),
    "resizePolicy[].restartPolicy": ("NotRequired", "RestartContainer"),
    **{f"{probe}.httpGet.scheme": ("HTTP", "HTTPS") for probe in PROBES},
}
CONTAINER_RANGES: dict[str, Range] = {
    "securityContext.runAsUser": _ID,
    "securityContext.runAsGroup": _ID,
    "ports[].containerPort": _PORT,
    "ports[].hostPort": (0, 65535),  # 0: none
    **{
        f"{probe}.{key}": (least, None)
        for probe in PROBES
        for key, least in (
            ("initialDelaySeconds", 0), ("timeoutSeconds", 1), ("periodSeconds", 1), ("successThreshold", 1),
            ("failureThreshold", 1), ("terminationGracePeriodSeconds", 1),
        )
    },
    **{f"{probe}.{handler}.port": _PORT for probe in PROBES for handler in ("httpGet", "tcpSocket", "grpc")},
}  # fmt: skip
CONTAINER_FORMATS: dict[str, Format] = {
    "image": (lambda text: text != "" and text == text.strip(), "an image's name, without spaces around it"),
    "env[].name": (formats.is_variable, "printable ASCII without `=`"),
    "env[].valueFrom.fieldRef.fieldPath": (formats.is_field_of_env, "a field that pods may read, as metadata.name"),
    "env[].valueFrom.resourceFieldRef.resource": (formats.is_resource_field, "limits or requests of cpu or memory"),
    "envFrom[].prefix": (lambda text: text == "" or formats.is_variable(text), "printable ASCII without `=`"),
    **{
        f"{probe}.httpGet.httpHeaders[].name": (
            lambda text: re.fullmatch(r"[-A-Za-z0-9]+", text) is not None,
            "letters, digits and `-`",
        )
        for probe in PROBES
    },
    "volumeMounts[].mountPath": _SOMETHING,
    "volumeMounts[].subPath": (lambda text: text == "" or formats.is_inside(text), "a relative path without `..`"),
}

POD_WORDS: dict[str, Words] = {
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "os.name": ("linux", "windows"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "preemptionPolicy": ("PreemptLowerPriority", "Never"),
    "topologySpreadConstraints[].whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
    "topologySpreadConstraints[].nodeAffinityPolicy": ("Honor", "Ignore"),
    "topologySpreadConstraints[].nodeTaintsPolicy": ("Honor", "Ignore"),
    "tolerations[].effect": ("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
    "tolerations[].operator": ("", "Exists", "Equal", "Lt", "Gt"),
    "securityContext.seccompProfile.type": _SECCOMP,
    "securityContext.fsGroupChangePolicy": ("OnRootMismatch", "Always"),
    "volumes[].hostPath.type": (
        "", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice",
    ),
    "volumes[].image.pullPolicy": ("Always", "IfNotPresent", "Never"),
}  # fmt: skip
POD_RANGES: dict[str, Range] = {
    "terminationGracePeriodSeconds": (0, None),
    "activeDeadlineSeconds": (1, None),
    "topologySpreadConstraints[].maxSkew": (1, None),
    "securityContext.runAsUser": _ID,
    "securityContext.runAsGroup": _ID,
    "securityContext.fsGroup": _ID,
    "securityContext.supplementalGroups[]": _ID,
    "volumes[].projected.sources[].serviceAccountToken.expirationSeconds": (600, 2**32),
    **{f"volumes[].{kind}.defaultMode": (0, 0o777) for kind in ("configMap", "secret", "projected", "downwardAPI")},
    **{f"volumes[].{kind}.items[].mode": (0, 0o777) for kind in ("configMap", "secret", "downwardAPI")},
    **{
        f"affinity.{kind}.preferredDuringSchedulingIgnoredDuringExecution[].weight": (1, 100)
        for kind in ("nodeAffinity", "podAffinity", "podAntiAffinity")
    },
}
_TERMS = "DuringSchedulingIgnoredDuringExecution[]"
POD_FORMATS: dict[str, Format] = {
    "serviceAccountName": _NAME_OR_NONE,
    "nodeName": _NAME_OR_NONE,
    "priorityClassName": _NAME_OR_NONE,
    "runtimeClassName": _NAME_OR_NONE,
    "hostname": _LABEL_OR_NONE,
    "subdomain": _LABEL_OR_NONE,
    "hostAliases[].ip": (formats.is_ip, "an IP address"),
    "dnsConfig.nameservers[]": (formats.is_ip, "an IP address"),
    "dnsConfig.searches[]": (
        lambda text: text == "." or formats.is_dns_name(text.rstrip(".").replace("_", "a")),
        "a domain",
    ),
    "readinessGates[].conditionType": (formats.is_key, "a label's key"),
    "volumes[].hostPath.path": (lambda text: ".." not in text.split("/"), "a path without `..`"),
    "securityContext.sysctls[].name": (formats.is_sysctl, "a sysctl's name"),
    "topologySpreadConstraints[].topologyKey": (formats.is_key, "a label's key"),
    **{
        f"affinity.{kind}.{path}topologyKey": (formats.is_key, "a label's key")
        for kind in ("podAffinity", "podAntiAffinity")
        for path in (f"required{_TERMS}.", f"preferred{_TERMS}.podAffinityTerm.")
    },
    "volumes[].emptyDir.medium": (
        lambda text: text in ("", "Memory", "HugePages") or text.startswith("HugePages-"),
        "Memory, HugePages or HugePages-<size>",
    ),
    "volumes[].configMap.name": _NAME,
    "volumes[].secret.secretName": _NAME,
    "volumes[].persistentVolumeClaim.claimName": _NAME,
    **{
        f"volumes[].{kind}.items[].path": (formats.is_inside, "a relative path without `..`")
        for kind in ("configMap", "secret", "downwardAPI")
    },
    "volumes[].downwardAPI.items[].fieldRef.fieldPath": (formats.is_field_of_volume, "a field of the pod's metadata"),
}

WORDS: dict[tuple[str, str], Words] = {
    ("Service", "spec.type"): ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    ("Service", "spec.sessionAffinity"): ("ClientIP", "None"),
    ("Service", "spec.ports[].protocol"): _PROTOCOLS,
    ("Service", "spec.externalTrafficPolicy"): ("Cluster", "Local"),
    ("Service", "spec.internalTrafficPolicy"): ("Cluster", "Local"),
    ("Service", "spec.ipFamilyPolicy"): ("SingleStack", "PreferDualStack", "RequireDualStack"),
    ("Service", "spec.ipFamilies[]"): ("IPv4", "IPv6"),
    ("NetworkPolicy", "spec.ingress[].ports[].protocol"): _PROTOCOLS,
    ("NetworkPolicy", "spec.egress[].ports[].protocol"): _PROTOCOLS,
    ("NetworkPolicy", "spec.policyTypes[]"): ("Ingress", "Egress"),
    ("Deployment", "spec.strategy.type"): ("RollingUpdate", "Recreate"),
    ("StatefulSet", "spec.updateStrategy.type"): ("RollingUpdate", "OnDelete"),
    ("DaemonSet", "spec.updateStrategy.type"): ("RollingUpdate", "OnDelete"),
    ("StatefulSet", "spec.podManagementPolicy"): ("OrderedReady", "Parallel"),
    ("StatefulSet", "spec.persistentVolumeClaimRetentionPolicy.whenDeleted"): ("Retain", "Delete"),
    ("StatefulSet", "spec.persistentVolumeClaimRetentionPolicy.whenScaled"): ("Retain", "Delete"),
    ("CronJob", "spec.concurrencyPolicy"): ("Allow", "Forbid", "Replace"),
    ("Job", "spec.completionMode"): ("NonIndexed", "Indexed"),
    ("Job", "spec.podReplacementPolicy"): ("TerminatingOrFailed", "Failed"),
    ("Job", "spec.podFailurePolicy.rules[].action"): ("FailJob", "FailIndex", "Ignore", "Count"),
    ("Job", "spec.podFailurePolicy.rules[].onExitCodes.operator"): ("In", "NotIn"),
    ("PersistentVolumeClaim", "spec.accessModes[]"): _ACCESS,
    ("PersistentVolumeClaim", "spec.volumeMode"): ("Filesystem", "Block"),
    ("PersistentVolume", "spec.accessModes[]"): _ACCESS,
    ("PersistentVolume", "spec.persistentVolumeReclaimPolicy"): ("Retain", "Delete", "Recycle"),
    ("PersistentVolume", "spec.volumeMode"): ("Filesystem", "Block"),
    ("StorageClass", "volumeBindingMode"): ("Immediate", "WaitForFirstConsumer"),
    ("StorageClass", "reclaimPolicy"): ("Delete", "Retain"),
    ("PriorityClass", "preemptionPolicy"): ("PreemptLowerPriority", "Never"),
    ("PodDisruptionBudget", "spec.unhealthyPodEvictionPolicy"): ("AlwaysAllow", "IfHealthyBudget"),
    ("HorizontalPodAutoscaler", "spec.metrics[].type"): (
        "Resource", "Pods", "Object", "External", "ContainerResource",
    ),
    **{
        ("HorizontalPodAutoscaler", f"spec.metrics[].{kind}.target.type"): ("Utilization", "Value", "AverageValue")
        for kind in ("resource", "containerResource", "pods", "object", "external")
    },
    **{
        ("HorizontalPodAutoscaler", f"spec.behavior.{way}.{key}"): words
        for way in ("scaleUp", "scaleDown")
        for key, words in (("policies[].type", ("Pods", "Percent")), ("selectPolicy", ("Max", "Min", "Disabled")))
    },
    ("Ingress", "spec.rules[].http.paths[].pathType"): ("Exact", "Prefix", "ImplementationSpecific"),
    ("RoleBinding", "roleRef.kind"): ("Role", "ClusterRole"),
    ("ClusterRoleBinding", "roleRef.kind"): ("ClusterRole",),
    ("RoleBinding", "subjects[].kind"): ("ServiceAccount", "User", "Group"),
    ("ClusterRoleBinding", "subjects[].kind"): ("ServiceAccount", "User", "Group"),
    ("CustomResourceDefinition", "spec.scope"): ("Namespaced", "Cluster"),
    ("CustomResourceDefinition", "spec.conversion.strategy"): ("None", "Webhook"),
    ("LimitRange", "spec.limits[].type"): ("Container", "Pod", "PersistentVolumeClaim"),
    ("ResourceQuota", "spec.scopes[]"): (
        "Terminating", "NotTerminating", "BestEffort", "NotBestEffort", "PriorityClass", "CrossNamespacePodAffinity",
        "VolumeAttributesClass",
    ),
    ("CronJob", "spec.jobTemplate.spec.completionMode"): ("NonIndexed", "Indexed"),
    **{
        (kind, f"webhooks[].{key}"): words
        for kind in ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")
        for key, words in (
            ("sideEffects", ("None", "NoneOnDryRun")),
            ("failurePolicy", _FAIL),
            ("matchPolicy", ("Exact", "Equivalent")),
            ("rules[].operations[]", ("*", "CREATE", "UPDATE", "DELETE", "CONNECT")),
            ("rules[].scope", ("*", "Cluster", "Namespaced")),
        )
    },
    ("ValidatingAdmissionPolicy", "spec.failurePolicy"): _FAIL,
    ("ValidatingAdmissionPolicyBinding", "spec.validationActions[]"): ("Deny", "Warn", "Audit"),
}  # fmt: skip

RANGES: dict[tuple[str, str], Range] = {
    ("Deployment", "spec.replicas"): (0, None),
    ("Deployment", "spec.minReadySeconds"): (0, None),
    ("Deployment", "spec.revisionHistoryLimit"): (0, None),
    ("Deployment", "spec.progressDeadlineSeconds"): (1, None),
    ("StatefulSet", "spec.replicas"): (0, None),
    ("StatefulSet", "spec.ordinals.start"): (0, None),
    ("StatefulSet", "spec.minReadySeconds"): (0, None),
    ("ReplicaSet", "spec.replicas"): (0, None),
    ("DaemonSet", "spec.minReadySeconds"): (0, None),
    **{
        (kind, f"{path}.{key}"): (0, None)
        for kind, path in (("Job", "spec"), ("CronJob", "spec.jobTemplate.spec"))
        for key in (
            "backoffLimit", "backoffLimitPerIndex", "completions", "parallelism", "ttlSecondsAfterFinished",
            "activeDeadlineSeconds", "maxFailedIndexes",
        )
    },
    ("CronJob", "spec.startingDeadlineSeconds"): (0, None),
    ("CronJob", "spec.successfulJobsHistoryLimit"): (0, None),
    ("CronJob", "spec.failedJobsHistoryLimit"): (0, None),
    ("HorizontalPodAutoscaler", "spec.maxReplicas"): (1, None),
    ("HorizontalPodAutoscaler", "spec.minReplicas"): (0, None),
    **{
        ("HorizontalPodAutoscaler", f"spec.metrics[].{kind}.target.averageUtilization"): (1, None)
        for kind in ("resource", "containerResource")
    },
    **{
        ("HorizontalPodAutoscaler", f"spec.behavior.{way}.{key}"): span
        for way in ("scaleUp", "scaleDown")
        for key, span in (
            ("stabilizationWindowSeconds", (0, 3600)), ("policies[].periodSeconds", (1, 1800)),
            ("policies[].value", (1, None)),
        )
    },
    ("Service", "spec.sessionAffinityConfig.clientIP.timeoutSeconds"): (1, 86400),
    ("NetworkPolicy", "spec.ingress[].ports[].port"): _PORT,
    ("NetworkPolicy", "spec.egress[].ports[].port"): _PORT,
    ("Ingress", "spec.rules[].http.paths[].backend.service.port.number"): _PORT,
    ("PriorityClass", "value"): (-(2**31), 10**9),
    **{
        (kind, f"webhooks[].{path}"): span
        for kind in ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")
        for path, span in (("timeoutSeconds", (1, 30)), ("clientConfig.service.port", _PORT))
    },
    ("LeaderWorkerSet", "spec.leaderWorkerTemplate.subGroupPolicy.subGroupSize"): (1, None),
}  # fmt: skip

FORMATS: dict[tuple[str, str], Format] = {
    ("Deployment", "spec.strategy.rollingUpdate.maxSurge"): _SHARE,
    ("Deployment", "spec.strategy.rollingUpdate.maxUnavailable"): _SHARE,
    ("DaemonSet", "spec.updateStrategy.rollingUpdate.maxUnavailable"): _SHARE,
    ("PodDisruptionBudget", "spec.minAvailable"): _SHARE,
    ("PodDisruptionBudget", "spec.maxUnavailable"): _SHARE,
    ("CronJob", "spec.schedule"): (
        formats.is_schedule, "five fields: minute, hour, day, month, weekday; a time zone stands in spec.timeZone",
    ),
    ("CronJob", "spec.timeZone"): (lambda text: text.lower() not in ("", "local"), "a zone's name, as Europe/Berlin"),
    ("PersistentVolumeClaim", "spec.storageClassName"): _NAME_OR_NONE,
    ("PersistentVolume", "spec.nfs.path"): (formats.is_absolute, "an absolute path"),
    ("PersistentVolume", "spec.hostPath.path"): (lambda text: ".." not in text.split("/"), "a path without `..`"),
    ("Ingress", "spec.ingressClassName"): _NAME,
    ("Ingress", "spec.tls[].hosts[]"): (formats.is_domain, "a DNS name"),
    ("Ingress", "spec.rules[].host"): (lambda text: text == "" or formats.is_domain(text), "a DNS name"),
    ("Service", "spec.ports[].appProtocol"): (formats.is_key, "a name, after a domain or not"),
    **{
        (kind, "webhooks[].clientConfig.service.path"): (formats.is_absolute, "a path that begins with /")
        for kind in ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")
    },
    **{
        (kind, "webhooks[].clientConfig.url"): (lambda text: text.startswith("https://"), "a URL with https")
        for kind in ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")
    },
    ("StorageClass", "provisioner"): (lambda text: formats.is_key(text.lower()), "a name, as example.org/disk"),
    ("HorizontalPodAutoscaler", "spec.scaleTargetRef.name"): _SOMETHING,
    ("HorizontalPodAutoscaler", "spec.metrics[].resource.name"): _SOMETHING,
    **{
        ("NetworkPolicy", f"spec.{way}[].ports[].port"): (
            lambda text: text.lstrip("-").isdigit() or formats.is_port_name(text), "a port's number or name",
        )
        for way in ("ingress", "egress")
    },
    ("HorizontalPodAutoscaler", "spec.scaleTargetRef.kind"): _SOMETHING,
    ("RoleBinding", "roleRef.name"): _SOMETHING,
    ("ClusterRoleBinding", "roleRef.name"): _SOMETHING,
    **{
        (kind, "roleRef.apiGroup"): (lambda text: text in ("", _RBAC), _RBAC)
        for kind in ("RoleBinding", "ClusterRoleBinding")
    },
    ("Service", "spec.externalIPs[]"): (formats.is_ip, "an IP address"),
    ("Service", "spec.clusterIP"): (lambda text: text in ("", "None") or formats.is_ip(text), "an IP address or None"),
    ("Service", "spec.loadBalancerSourceRanges[]"): (lambda text: formats.network(text.strip()) is not None, "a CIDR"),
    ("CustomResourceDefinition", "spec.group"): (
        lambda text: "." in text and formats.is_dns_name(text), "a DNS name with a dot",
    ),
    ("CustomResourceDefinition", "spec.names.kind"): (
        lambda text: formats.is_dns_label(text.lower()), "letters and digits",
    ),
    ("CustomResourceDefinition", "spec.names.shortNames[]"): _LABEL,
    **{
        ("CustomResourceDefinition", f"spec.versions[].subresources.scale.{key}"): (
            lambda text: text.startswith("."), "a path that begins with a dot",
        )
        for key in ("specReplicasPath", "statusReplicasPath", "labelSelectorPath")
    },
    ("CustomResourceDefinition", "spec.names.plural"): _LABEL,
    ("CustomResourceDefinition", "spec.versions[].name"): _LABEL,
}  # fmt: skip
