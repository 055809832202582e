"""The spec: one YAML file that says everything a user decides about one deployment.

slices      its parts           compress     the part for a smaller model    kubernetes   the part for the cluster
weights     of it, weights that keep their places    online       the part for learning from feedback
deployment  the whole, and what must agree among its parts
reading     from YAML, with errors that name the key, the value and the mending
"""

from builders.spec.compress import BudgetSlice, DistilSlice, LossesSlice, LowRankSlice, PruneSlice, StepSlice
from builders.spec.deployment import DeploymentSpec
from builders.spec.kubernetes import KubernetesSlice
from builders.spec.online import CanarySlice, FederatedSlice, GateSlice, LearnerSlice, OnlineSlice, WhenSlice
from builders.spec.reading import PRESETS, load_spec, resolve_spec_path
from builders.spec.slices import (
    FP8_TARGET,
    POOLINGS,
    CpuPrecision,
    EngineSlice,
    Flavour,
    GenerationSlice,
    GraphPrecision,
    ModelSlice,
    ParallelSlice,
    Platform,
    Pooling,
    PrecisionSlice,
    ProfileSlice,
    QatSlice,
    Range,
    RateLimitSlice,
    Rounding,
    ServingSlice,
    Slice,
    SloSlice,
    Task,
    WeightRounder,
)
from builders.spec.weights import ClusterSlice, GradualSlice, SparsifySlice

__all__ = [
    "FP8_TARGET",
    "POOLINGS",
    "PRESETS",
    "BudgetSlice",
    "CanarySlice",
    "ClusterSlice",
    "CpuPrecision",
    "DeploymentSpec",
    "DistilSlice",
    "EngineSlice",
    "FederatedSlice",
    "Flavour",
    "GateSlice",
    "GenerationSlice",
    "GradualSlice",
    "GraphPrecision",
    "KubernetesSlice",
    "LearnerSlice",
    "LossesSlice",
    "LowRankSlice",
    "ModelSlice",
    "OnlineSlice",
    "ParallelSlice",
    "Platform",
    "Pooling",
    "PrecisionSlice",
    "ProfileSlice",
    "PruneSlice",
    "QatSlice",
    "Range",
    "RateLimitSlice",
    "Rounding",
    "ServingSlice",
    "Slice",
    "SloSlice",
    "SparsifySlice",
    "StepSlice",
    "Task",
    "WeightRounder",
    "WhenSlice",
    "load_spec",
    "resolve_spec_path",
]
