"""What schemas let pass: rules as pure functions over the whole set of objects.

resources   quantities, devices, memory       references  ConfigMaps, claims, volumes, variables
traffic     selectors, ports, probes          lifecycle   grace, rollouts, budgets, autoscalers
security    Pod Security, tokens, rights      versions    removed APIs, which `check` asks before schemas
values      names, ranges, words, formats     tables      of these, field by field
formats     names, addresses, schedules       pod_fields, kind_fields, admin_fields  fields that go together
severities  error or warning, by rule
schemas     what an API server would refuse   custom_resources  the same for kinds that are not built in
objects     YAML to objects, strictly         check       all of it over a set of files
definitions schemas from given CRDs           sarif       findings for code scanning
"""

from __future__ import annotations

from builders.manifests.lint import (
    admin_fields,
    kind_fields,
    lifecycle,
    pod_fields,
    references,
    resources,
    security,
    traffic,
    values,
)
from builders.manifests.lint.objects import Finding, ObjectSet

# Of one object, which may be one that lost what its schema refused.
_ALONE = (
    lifecycle.duplicates,
    values.names,
    values.labels,
    values.fixed_words,
    values.ranges,
    values.texts,
    pod_fields.pods,
    pod_fields.containers,
    pod_fields.expressions,
    kind_fields.kinds,
    admin_fields.admin_kinds,
    resources.quantities,
    resources.devices,
    resources.requests_within_limits,
    resources.memory_is_bounded,
    resources.memory_volumes,
    resources.volume_sizes,
    references.mounts,
    traffic.workload_selectors,
    traffic.container_ports,
    traffic.probes,
    lifecycle.rollouts,
    lifecycle.startup_within_deadline,
    security.restricted_pods,
    security.restricted_containers,
    security.read_only_root,
    security.image_tags,
    security.wildcard_rights,
)
# Of several: they mean something only where the whole set is what it should be.
_TOGETHER = (
    references.config_maps,
    references.claims_and_accounts,
    references.device_claims,
    references.variables,
    traffic.services,
    traffic.readiness,
    traffic.policies,
    traffic.routes,
    traffic.monitors,
    lifecycle.grace,
    lifecycle.budgets,
    lifecycle.autoscalers,
    lifecycle.shared_claims,
    security.mounted_tokens,
)


def lint(objects: ObjectSet, whole: bool = True) -> list[Finding]:
    """Findings of every rule, in the order of the rules. Objects must have passed their schema: types are trusted.

    `whole` is False where parts are missing that a schema refused: then only rules about one object hold.
    """
    return [finding for rule in (*_ALONE, *(_TOGETHER if whole else ())) for finding in rule(objects)]
