"""What the spec says about the cluster."""

from __future__ import annotations

from builders.spec.slices import Slice


class KubernetesSlice(Slice):
    """Deployment to a cluster."""
