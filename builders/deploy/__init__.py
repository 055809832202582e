"""Kubernetes: manifests from a spec, checks that need no cluster, and the client that deploys.

sizing      arithmetic: GPUs, memory, probe budgets and scaling thresholds of a spec
manifests   an overlay from a spec, of patches and jobs     render    kubectl kustomize
objects     YAML to objects, strictly         schemas   what an API server would refuse, and custom resources
lint        what it would accept, and a cluster would then fail on
check       all of it over a set of files
client      a cluster: apply, wait, undo
"""
