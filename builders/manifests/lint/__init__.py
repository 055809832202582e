"""What schemas let pass: rules as pure functions over the whole set of objects.

resources   quantities, devices, memory       references  ConfigMaps, claims, volumes, variables
traffic     selectors, ports, probes          lifecycle   grace, rollouts, budgets, autoscalers
security    Pod Security, tokens, rights      versions    removed APIs, which `check` asks before schemas
schemas     what an API server would refuse   custom_resources  the same for kinds that are not built in
objects     YAML to objects, strictly         check       all of it over a set of files
"""

from __future__ import annotations

from builders.manifests.lint import lifecycle, references, resources, security, traffic
from builders.manifests.lint.objects import Finding, ObjectSet

RULES = (
    lifecycle.duplicates,
    resources.quantities,
    resources.devices,
    resources.requests_within_limits,
    resources.memory_is_bounded,
    resources.memory_volumes,
    resources.volume_sizes,
    references.config_maps,
    references.claims_and_accounts,
    references.device_claims,
    references.mounts,
    references.variables,
    traffic.workload_selectors,
    traffic.services,
    traffic.container_ports,
    traffic.probes,
    traffic.readiness,
    traffic.policies,
    traffic.routes,
    traffic.monitors,
    lifecycle.grace,
    lifecycle.rollouts,
    lifecycle.startup_within_deadline,
    lifecycle.budgets,
    lifecycle.autoscalers,
    lifecycle.shared_claims,
    security.restricted_pods,
    security.restricted_containers,
    security.read_only_root,
    security.mounted_tokens,
    security.image_tags,
    security.wildcard_rights,
)


def lint(objects: ObjectSet) -> list[Finding]:
    """Findings of every rule, in the order of the rules. Objects must have passed their schema: types are trusted."""
    return [finding for rule in RULES for finding in rule(objects)]
